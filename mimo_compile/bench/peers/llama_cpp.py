"""llama.cpp as a peer: its matrix multiplication over its storage types, in every kind of memory it has.

``plain`` keeps rows as a model file has them; ``repack`` and ``amx`` lay weights out anew for kernels that
take many rows at once, as llama.cpp itself does where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mimo_compile.bench.peers import ggml as library
from mimo_compile.bench.peers.base import (
    Ask,
    LeftOut,
    Peer,
    Variant,
    int8_error,
    packed,
    random_weights,
)
from mimo_compile.errors import EnvironmentMismatch
from mimo_compile.ir.ops.base import Array

if TYPE_CHECKING:
    from mimo_compile.bench.models.entrant import Entrant, ModelAsk

_NEAR: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1, ("Q1_0", "TQ1_0", "TQ2_0")),
    (2, ("TQ1_0", "TQ2_0", "Q2_K")),
    (3, ("Q3_K", "Q4_0")),
    (4, ("Q4_0", "Q4_K")),
    (5, ("Q5_0", "Q5_K")),
    (6, ("Q6_K", "Q8_0")),
    (8, ("Q8_0",)),
)
"""Storage types near a number of bits; the last ones hold any more. Q2_0 is not among them: this version
computes it without vector instructions on x86, 50 times slower than Q2_K."""
_FLOATS = ("F16",)
_FALL_BACK = "Q4_0"
"""What llama.cpp itself stores a matrix in whose rows do not fit the wanted type."""
_SUPERBLOCK = 256
_REBUILD = "build llama-cpp-python with CC=clang CXX=clang++: gcc 12 removes the tile configuration"


class LlamaCppPeer(Peer):
    """The ggml library that llama-cpp-python brings, one graph for each argument set."""

    name = "llama.cpp"
    packages = ("llama-cpp-python",)

    def prepare(self, ask: Ask) -> Callable[[], None]:
        """Return what sets the number of threads."""
        ggml = library.load()
        return lambda: ggml.use_threads(ask.hardware.threads)

    def models(self, ask: ModelAsk) -> Iterator[Entrant | LeftOut]:
        """Offer the checkpoint in the storage types near the bits of ours."""
        from mimo_compile.bench.models.llama import entrants

        yield from entrants(ask)

    def missing(self) -> LeftOut | None:
        """Return what is said when the package is absent, or was built without the library."""
        absent = super().missing()
        if absent is None:
            try:
                library.load()
            except EnvironmentMismatch as error:
                return LeftOut(self.name, str(error), self.remedy)
        return absent

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer the storage types near the workload's bits, in each kind of memory that knows them."""
        if ask.workload.op != "mpgemm":
            return
        if "bias" in ask.inputs:
            yield LeftOut("mul_mat", "is compared without bias only")
            return
        ggml = library.load()
        buffers = library.Buffers(ggml, ask.inputs["x"], ask.shape[1])
        bits = ask.format.bits_per_weight
        fits = False
        for name in _FLOATS if ask.format.is_float else next(t for b, t in _NEAR if b >= bits):
            if not ggml.has(name):
                yield LeftOut(name, "is not in this build")
            elif ask.shape[2] % ggml.block(name):
                yield LeftOut(name, f"K={ask.shape[2]} is no multiple of {ggml.block(name)}")
            else:
                fits = True
                yield from _in_memories(ask, ggml, buffers, name)
        if not fits and not ask.shape[2] % ggml.block(_FALL_BACK):
            yield from _in_memories(ask, ggml, buffers, _FALL_BACK)


def _in_memories(
    ask: Ask, ggml: library.Ggml, buffers: library.Buffers, name: str
) -> Iterator[Variant | LeftOut]:
    _, n, k = ask.shape
    rows = packed(f"ggml {name}", n, k, lambda: ggml.quantise(name, random_weights(n, k)))
    super_block = ggml.block(name) == _SUPERBLOCK
    error = int8_error(ask.inputs["x"], _SUPERBLOCK if super_block else 32)
    for memory in ggml.memories:
        try:
            library.Multiplication(buffers, name, rows, k, memory)
        except ValueError:  # most types have few kinds of memory: no news
            continue
        if memory == "amx" and not library.survives(memory):
            yield LeftOut(f"{name}-amx", "crashes on this processor", _REBUILD)
            continue

        def make(memory: str = memory) -> library.Multiplication:
            return library.Multiplication(buffers, name, rows, k, memory)

        def call(arguments: Any) -> None:
            arguments()

        def result(arguments: Any) -> Array:
            arguments()
            return buffers.result()

        def weights(some: Any) -> Array:
            return ggml.dequantise(name, rows[some], k)

        yield Variant(
            f"{name}-{memory}", make, call, rows.nbytes, ggml.bits(name), result, weights, error
        )
