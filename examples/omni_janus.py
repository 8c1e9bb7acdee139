"""A model that reads and produces images: SigLIP encoder, Llama, VQ image decoder (Janus).

    omnicompile plan examples/omni_janus.py --gpus 128
    omnicompile verify examples/omni_janus.py --gpus 4

Its parts and sizes are declared in omni/janus.yaml.
"""

from pathlib import Path

import torch

from omnicompile import omni

HERE = Path(__file__).parent / "omni"


def build() -> torch.nn.Module:
    return omni.build(HERE / "janus.yaml").to(torch.bfloat16)


def tiny() -> torch.nn.Module:
    return omni.build(HERE / "janus_tiny.yaml")
