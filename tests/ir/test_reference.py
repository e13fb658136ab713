"""The import, run op by op in the virtual machine, equals eager torch."""

import numpy as np
import torch

from mimo_compile.ir.importer import import_exported
from mimo_compile.ir.ops import load_all
from mimo_compile.ir.reference import run_reference

load_all()


class Attend(torch.nn.Module):
    """Quantised projection, cache append, attention, float linear, generic tail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.Parameter(torch.rand(64) + 0.5)
        self.proj = torch.nn.Linear(64, 48)
        self.register_buffer("codes", torch.randint(0, 16, (128, 64), dtype=torch.uint8))
        self.register_buffer("scale", torch.full((128, 1), 0.0078125))
        self.register_buffer("k_cache", torch.zeros(32, 1, 32))
        self.register_buffer("v_cache", torch.zeros(32, 1, 32))

    def forward(self, x: torch.Tensor, table: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        mimo = torch.ops.mimo
        h = torch.nn.functional.rms_norm(x, (64,), self.norm, 1e-5)
        qkv = mimo.mpgemm(h, self.codes, self.scale, None, None, "w4grow", "a8")
        q = mimo.kv_append(qkv, table, pos, None, None, self.k_cache, self.v_cache, 2, 1e-5, 1.0)
        o = mimo.cached_attention(q, self.k_cache, self.v_cache, pos, None, 32**-0.5, 0)
        return torch.nn.functional.silu(self.proj(o.reshape(4, 64))) + 1


def test_virtual_machine_equals_eager() -> None:
    module = Attend().eval()
    angle = torch.arange(4.0)[:, None] * torch.rand(8)
    args = (
        torch.randn(4, 64),
        torch.stack([angle.cos(), angle.sin()], 1),
        torch.tensor([0, 3], dtype=torch.int32),
    )
    program = torch.export.export(module, args, strict=False)
    imported = import_exported(program)
    values = dict(zip(imported.inputs, (a.numpy() for a in args), strict=True))
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        values[name] = tensor.detach().numpy().copy()
    with torch.no_grad():
        wanted = module(*args).numpy()
    (got,) = run_reference(imported, values)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(values["k_cache"], module.k_cache.numpy(), atol=1e-5)
    assert np.abs(values["k_cache"][:3]).min() > 0
    assert not values["k_cache"][3:].any()
