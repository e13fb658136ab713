"""What runs an artifact's entry points: this machine's CPU (`host`), or its GPU (`gpu`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from mimo_compile.errors import ArtifactError
from mimo_compile.runtime.zipform import CODES

if TYPE_CHECKING:
    from mimo_compile.runtime.container import Parts
    from mimo_compile.runtime.entry import Timing
    from mimo_compile.runtime.expert_memory import ExpertMemory, Experts
    from mimo_compile.runtime.pages import PagePool
    from mimo_compile.runtime.program import Entry, Manifest

Array = npt.NDArray[Any]

_HOMES = {"cpu": "mimo_compile.runtime.host", "cuda": "mimo_compile.runtime.gpu"}
"""By the kind of target: a module with `check` and `open_machine`."""


class Bound(Protocol):
    """An entry point that can be run."""

    name: str
    program: Entry
    inputs: dict[str, Array]
    """Name to array; write these, then `run`."""
    outputs: dict[str, Array]
    """Name to array; valid until any entry of the module runs again."""

    @property
    def calls(self) -> list[Any]:
        """Functions of kernels with their arguments, which may be exchanged.

        Raises:
            UsageError: The machine has nothing such.
        """

    def array(self, buffer: int) -> Array:
        """Return one of the program's buffers, by its index, as an array on its memory.

        Raises:
            UsageError: It is not in this process's memory.
        """

    def fill(self, arrays: Iterable[Array]) -> None:
        """Copy the inputs, in their order, to where the calls expect them."""

    def run(self) -> None:
        """Call all kernels in their order.

        Raises:
            MimoError: A kernel failed.
        """

    def timings(self, arrays: Sequence[Array], repeat: int) -> list[Timing]:
        """Run `repeat` times on these inputs; returns the median time of each kernel call."""


class Machine(Protocol):
    """Code and memory of a module: arena, weights and states."""

    threads: int
    """That kernels use; of a GPU 1, the one that waits for it."""
    experts: Experts | None
    """Those that come into memory of a given size as tokens need them."""
    pool: PagePool | None
    """Pages that sequences take."""

    def enter(self) -> None:
        """Make entry points ready to run in the calling thread.

        Raises:
            UsageError: This process may not use them.
        """

    def bound(self, name: str, program: Entry, slot: int) -> Bound:
        """Return an entry point on the states of a sequence.

        Raises:
            ArtifactError: Its weights differ from their hash, or a kernel is missing.
        """

    def clear(self) -> None:
        """Make all states zero, and take all pages back."""


def code_member(manifest: Manifest, where: str) -> str:
    """Return the name of the member with an artifact's code.

    Raises:
        ArtifactError: It is for a kind of target that this version does not know.
    """
    kind = manifest.target.kind
    if kind not in CODES:
        raise ArtifactError(
            f"the artifact is for {kind} ({manifest.target.name}); this version knows "
            f"{', '.join(CODES)}",
            where=where,
            remedy="Run: pip install --upgrade mimo-compile",
        )
    return CODES[kind]


def check(manifest: Manifest, where: str) -> None:
    """Check that installed versions and this machine fit what the code was built for.

    Raises:
        EnvironmentMismatch: They do not; the message says what is missing, and the remedy.
    """
    code_member(manifest, where)
    import_module(_HOMES[manifest.target.kind]).check(manifest, where)


def machine_of(
    parts: Parts,
    *,
    threads: int | None,
    kv_store: str | os.PathLike[str] | None,
    expert_memory: int | str | ExpertMemory | None,
) -> Machine:
    """Return what runs an artifact; arguments as in `module.load`.

    Raises:
        EnvironmentMismatch: It is not there.
        UsageError: An argument that it cannot follow.
        MimoError: Its memory does not suffice.
    """
    home = import_module(_HOMES[parts.manifest.target.kind])
    machine: Machine = home.open_machine(
        parts, threads=threads, kv_store=kv_store, expert_memory=expert_memory
    )
    return machine
