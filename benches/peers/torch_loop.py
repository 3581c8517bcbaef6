"""The ten lines that people write: average some checkpoints with PyTorch, all of them in memory.

usage: torch_loop.py OUT MEMBER MEMBER...
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


out, members = Path(sys.argv[1]), [load(folder) for folder in sys.argv[2:]]
mean = lambda name: sum(member[name].float() for member in members) / len(members)
merged = {name: mean(name).to(torch.bfloat16).contiguous() for name in members[0]}
out.mkdir(parents=True)
save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
