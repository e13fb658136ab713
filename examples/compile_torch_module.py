"""Compile any torch module, and check that it gives what torch gives.

python examples/compile_torch_module.py
"""

import tempfile
from pathlib import Path

import torch

import mimo_compile as mc


class Block(torch.nn.Module):
    """Two linear layers with a residual, as in any transformer."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(8, 128)
    artifact = mc.compile(block, example_inputs=(x,))
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "block.mimo")
        model = mc.load(path)
        y = torch.from_numpy(model(x))
    with torch.no_grad():
        error = (y - block(x)).abs().max().item()
    print(f"{len(artifact.manifest.plan)} kernels, largest difference from torch {error:.2e}")
    assert error < 1e-3


if __name__ == "__main__":
    main()
