"""Qwen3-30B-A3B with the encoders of Qwen2.5-Omni and a MoVQ image decoder (Qwen3-MoE#Omni).

    omnicompile plan examples/omni_qwen3_moe.py --gpus 128
    omnicompile verify examples/omni_qwen3_moe.py --gpus 4

Its parts and sizes are declared in omni/qwen3_moe_omni.yaml.
"""

from pathlib import Path

import torch

from omnicompile import omni

HERE = Path(__file__).parent / "omni"


def build() -> torch.nn.Module:
    return omni.build(HERE / "qwen3_moe_omni.yaml").to(torch.bfloat16)


def tiny() -> torch.nn.Module:
    return omni.build(HERE / "qwen3_moe_omni_tiny.yaml")
