"""Llama-3.1-8B with the encoders of Qwen2.5-Omni and a MoVQ image decoder (LLaMA#Omni).

    omnicompile plan examples/omni_llama.py --gpus 128
    omnicompile verify examples/omni_llama.py --gpus 4

Its parts and sizes are declared in omni/llama_omni.yaml.
"""

from pathlib import Path

import torch

from omnicompile import omni

HERE = Path(__file__).parent / "omni"


def build() -> torch.nn.Module:
    return omni.build(HERE / "llama_omni.yaml").to(torch.bfloat16)


def tiny() -> torch.nn.Module:
    return omni.build(HERE / "llama_omni_tiny.yaml")
