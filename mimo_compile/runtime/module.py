"""Loads artifacts and calls their entry points."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, ArtifactWarning, UsageError
from mimo_compile.runtime import batch, generate, scores
from mimo_compile.runtime.arguments import check_direct, whole
from mimo_compile.runtime.container import Parts, Verify, open_artifact
from mimo_compile.runtime.entry import Array, Signature, Timing, accept, signature_of
from mimo_compile.runtime.expert_memory import ExpertMemory
from mimo_compile.runtime.generate import Prompt, Stats
from mimo_compile.runtime.machine import Bound, machine_of
from mimo_compile.runtime.program import Entry, Manifest
from mimo_compile.runtime.sampling import Sampling
from mimo_compile.runtime.session import Session
from mimo_compile.runtime.speculate import Speculation


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify: Verify = "lazy",
    kv_store: str | os.PathLike[str] | None = None,
    expert_memory: int | str | ExpertMemory | None = None,
) -> Module:
    """Load an artifact.

    Args:
        path: A `.mimo` file. It stays mapped: replace it, but do not write into it.
        threads: How many threads the kernels use; by default as many as they were tuned for, as
            far as this process may use that many CPUs.
        verify: `"lazy"` hashes each MiB of the weights before its first use; `"full"` hashes all
            of them now.
        kv_store: A folder: keys and values that decoded tokens read by lists alone lie in a file there,
            without a name, which is gone with the module. None: in memory, as all else.
        expert_memory: Bytes, text such as `"2GiB"`, or an `ExpertMemory`: experts stay in the file, and come
            into so much memory as tokens need them. None: they are mapped, as all other weights.

    Raises:
        InputError: The file cannot be read.
        ArtifactError: It is damaged or of another schema.
        EnvironmentMismatch: It does not fit this machine or what is installed.
        UsageError: `threads` is more than there are, or there is nothing to keep in `kv_store`, or no room;
            or there are no experts, or `expert_memory` is less than a token needs.
    """
    parts = open_artifact(path, verify=verify)
    return Module(parts, threads=threads, kv_store=kv_store, expert_memory=expert_memory)


class Module:
    """A loaded artifact: entry points that are called, or a decoder that generates text.

    Calls from several threads wait for each other; each thread that calls has its own pool of
    kernel threads (TVM's, which belong to the thread that starts them), so call from one.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        threads: int | None = None,
        kv_store: str | os.PathLike[str] | None = None,
        expert_memory: int | str | ExpertMemory | None = None,
    ) -> None:
        """Link the code and reserve memory; `load` is the usual way to here."""
        self.manifest: Manifest = parts.manifest
        self._programs = parts.programs.entries
        self._texts = parts.texts
        self._where = parts.where
        if self.manifest.shapes_only:
            warnings.warn(
                f"{parts.where} was compiled from shapes alone (--shapes-only): all weights are zeros. How "
                "long it takes means something but for experts, lists of attention and drafts, what it says "
                "does not",
                ArtifactWarning,
                stacklevel=3,
            )
        decoder = self.manifest.decoder
        self.batch = 1 if decoder is None else decoder.batch
        """Sequences that may be in progress at once."""
        self._machine = machine_of(
            parts, threads=threads, kv_store=kv_store, expert_memory=expert_memory
        )
        self.threads = self._machine.threads
        self.experts = self._machine.experts
        """Experts that come into memory of a given size as tokens need them; None: all are mapped."""
        self.pool = self._machine.pool
        """Pages that sequences take; None: each slot has caches of its own."""
        self._bound: dict[tuple[str, int], Bound] = {}
        self.lock = threading.RLock()
        """Held while an entry point runs and until its outputs are copied; one thread at a time."""
        self.rejected: list[Callable[[int, int], None]] = []
        """Called with the slot of a sequence and the position from which drafts of it were not kept."""
        self._tokenizer: Any = None
        self._begun = 0
        self._owners = [0] * self.batch  # number of the sequence that each slot's states belong to

    def __repr__(self) -> str:
        """Name the artifact and what it can do."""
        return f"<Module {self.manifest.name}: {', '.join(self._programs)}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: two modules on the same states would disturb each other."""
        raise TypeError(
            f"a Module cannot be pickled or copied: load {self._where} once more, in each process"
        )

    @property
    def entries(self) -> Mapping[str, Signature]:
        """The entry points by name, with what they take and give."""
        return {name: signature_of(entry) for name, entry in self._programs.items()}

    def call(self, entry: str, *inputs: Any) -> Any:
        """Call an entry point.

        Args:
            entry: Its name.
            inputs: Its inputs in their order (see `entries`): numpy arrays, tensors that speak
                DLPack (torch, jax, ...) in the CPU's memory, or nested lists of numbers. They are
                viewed in place and copied once, into the arena.

        Returns:
            The output as a numpy array with memory of its own, or a tuple of them.

        Raises:
            UsageError: There is no such entry, an input has another shape or dtype, positions are outside of
                the context, or it is an entry over pages, which only sessions have.
            ArtifactError: Weights that are needed for the first time differ from their hash.
            MimoError: A kernel failed; the message names the call.
        """
        arrays = self._accept(entry, inputs)
        with self.lock:
            bound = self.bind(entry)
            bound.fill(arrays)
            bound.run()
            outputs = tuple(array.copy() for array in bound.outputs.values())
        return outputs[0] if len(outputs) == 1 else outputs

    def _accept(self, entry: str, inputs: Sequence[Any]) -> list[Array]:
        program = self._program(entry)
        if len(inputs) != len(program.inputs):
            raise UsageError(
                f"entry {entry} takes {len(program.inputs)} inputs, {len(inputs)} are given: "
                f"{entry}{signature_of(program)}"
            )
        arrays = [
            accept(value, program.buffers[index], f"input {name} of entry {entry}")
            for value, (name, index) in zip(inputs, program.inputs.items(), strict=True)
        ]
        check_direct(self, entry, program, arrays)
        return arrays

    def __call__(self, *inputs: Any) -> Any:
        """Call the entry point `main`; see `call`."""
        if "main" not in self._programs:
            raise UsageError(
                f"{self.manifest.name} has no entry main; it has {', '.join(self._programs)}",
                remedy="Use generate for text, or call(entry, ...)."
                if self.manifest.decoder
                else "Use call(entry, ...).",
            )
        return self.call("main", *inputs)

    def bind(self, entry: str, slot: int = 0) -> Bound:
        """Return an entry point ready to run on this thread; for those who fill the arena themselves.

        Nothing guards what is done with it against other threads.

        Args:
            entry: Its name.
            slot: Whose states it works on, of the sequences that may be in progress; `batch_B` works
                on those of all.

        Raises:
            UsageError: There is no such entry or slot; or states lie in a file, or experts come and go,
                and this process was forked from the one that loaded the module.
            ArtifactError: Its weights differ from their hash, or a kernel is missing.
        """
        self._machine.enter()
        bound = self._bound.get((entry, slot))
        if bound is None:
            with self.lock:
                program = self._program(entry)
                slot = self._slot(slot)
                if slot and entry.startswith("batch_"):
                    raise UsageError(f"{entry} works on all sequences, not on {slot} alone")
                bound = self._machine.bound(entry, program, slot)
                self._bound[entry, slot] = bound
        return bound

    def _slot(self, slot: int) -> int:
        slot = whole(slot, "slot")
        if not 0 <= slot < self.batch:
            raise UsageError(
                f"there is no sequence {slot}: {self.manifest.name} was compiled for {self.batch} at a time",
                remedy="Compile it with a greater --batch.",
            )
        return slot

    def _program(self, entry: str) -> Entry:
        try:
            return self._programs[entry]
        except KeyError:
            raise UsageError(
                f"{self.manifest.name} has no entry {entry!r}; it has {', '.join(self._programs)}"
            ) from None

    def reset(self) -> None:
        """Make all states zero, as they were after loading, and end sequences in progress."""
        with self.lock:
            self._owners = [0] * self.batch
            self._machine.clear()

    def profile(self, entry: str, *inputs: Any, repeat: int = 5) -> list[Timing]:
        """Call an entry point `repeat` times and return the median time of each kernel call.

        States change as in any call. Units: seconds.
        """
        arrays = self._accept(entry, inputs)
        with self.lock:
            return self.bind(entry).timings(arrays, repeat)

    @property
    def tokenizer(self) -> Any:
        """The artifact's tokenizer (of the package `tokenizers`).

        Raises:
            UsageError: The artifact has none.
            ArtifactError: The one it has cannot be read.
        """
        if self._tokenizer is None:
            if "tokenizer.json" not in self._texts:
                raise UsageError(
                    f"{self.manifest.name} has no tokenizer",
                    remedy="Pass token ids, and use generate_ids.",
                )
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_str(self._texts["tokenizer.json"].decode("utf-8"))
            except Exception as error:  # the package raises nothing more special
                raise ArtifactError(
                    f"tokenizer.json cannot be read: {error}",
                    where=self._where,
                    remedy="Compile the model again with the right tokenizer.json.",
                ) from error
        return self._tokenizer

    def text(self, member: str) -> bytes | None:
        """Return an optional member (`config.json`, `records.jsonl`, `tokenizer.json`) or None."""
        return self._texts.get(member)

    def session(self, adapter: str | None = None, slot: int = 0) -> Session:
        """Begin a sequence of tokens; it ends the one before it. See `Session`.

        Args:
            adapter: Which of the artifact's adapters changes the model for it; None: none.
            slot: In which of the artifact's places for sequences, of which there are `batch`: it
                ends the one in this place only.

        Raises:
            UsageError: There is no such adapter or slot.
        """
        with self.lock:
            slot = self._slot(slot)
            session = Session(self, self._begun + 1, adapter, slot)
            self.vacate(slot)
            self._begun += 1
            self._owners[slot] = self._begun
            return session

    def vacate(self, slot: int) -> None:
        """End the sequence in a slot, if there is one, and take its pages back.

        Raises:
            UsageError: There is no such slot.
        """
        with self.lock:
            slot = self._slot(slot)
            self._owners[slot] = 0
            if self.pool is not None:
                self.pool.cut(slot, 0)

    def owns(self, session: int) -> bool:
        """Whether states still belong to this session."""
        return session in self._owners

    def generate_ids(
        self,
        prompt: str | Sequence[int] | npt.NDArray[Any],
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        stats: Stats | None = None,
        adapter: str | None = None,
        session: Session | None = None,
        speculative: bool | Speculation = False,
    ) -> Iterator[int]:
        """Generate token ids one by one; arguments as in `generate`."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        rest = (stop_at_eos, stats, adapter, session, speculative)
        return generate.generate_ids(self, prompt, max_new_tokens, sampling, *rest)

    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[Any],
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        stats: Stats | None = None,
        adapter: str | None = None,
        session: Session | None = None,
        speculative: bool | Speculation = False,
    ) -> Iterator[str]:
        """Generate text, piece by piece; no piece ends within a character.

        Args:
            prompt: Text, or token ids.
            max_new_tokens: How many tokens to add at most; by default as many as fit.
            temperature: 0 takes the most probable token (the lowest id among equals); above,
                tokens are drawn from the distribution at this temperature.
            top_k: Draw among this many most probable tokens; 0 means all.
            top_p: Draw among the most probable tokens that have this much probability together.
            seed: The same seed draws the same tokens; each position has its own random number.
            stop_at_eos: Stop before an end-of-text token.
            stats: Filled with counts, times and energy while tokens are generated.
            adapter: Which of the artifact's low-rank adapters to use for this text; None: none.
            session: Of this module (see `session`): what it holds of the prompt's beginning is not
                computed again, and afterwards it holds this text. None: a new one.
            speculative: Let the model's draft heads say some tokens ahead, and verify them in one pass. A
                `Speculation` says how. The text is the same, or distributed alike: see docs/speculative.md.

        Raises:
            UsageError: The artifact is no decoder, has no draft heads where they are asked for, or an
                argument is out of range; at once, not at the first piece.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        rest = (stop_at_eos, stats, adapter, session, speculative)
        return generate.generate_text(self, prompt, max_new_tokens, sampling, *rest)

    def generate_batch_ids(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop_at_eos: bool = True,
        stats: Stats | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Generate token ids of several texts; arguments as in `generate_batch`."""
        draw = (temperature, top_k, top_p)
        asks = batch.asks_of(self, prompts, max_new_tokens, draw, seed, adapter)
        return batch.generate_ids(self, asks, stop_at_eos, stats)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop_at_eos: bool = True,
        stats: Stats | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Generate several texts, as many at a time as the artifact was compiled for (`--batch`).

        Each text is what `generate` alone would give, up to roundings. A prompt that finds no place waits
        until a text ends, so there may be any number of them. With pages (`--pages`) it waits for these, too,
        and shares those of an equal beginning with a text in progress; where there are none left, the text
        that began last is set aside and read again. Sequences in progress end in the slots that
        are used: one for each prompt, from 0 on, up to all. `generate` uses slot 0, so the two cannot take
        turns.

        Args:
            prompts: Texts, or token ids of each.
            max_new_tokens: How many tokens to add at most to each; by default as many as fit.
            temperature: As in `generate`, likewise `top_k`, `top_p` and `stop_at_eos`.
            top_k: As in `generate`.
            top_p: As in `generate`.
            seed: One for all, or one for each prompt.
            stop_at_eos: As in `generate`.
            stats: Filled with totals while tokens are generated; energy is not measured.
            adapter: Of all texts, or one for each prompt.

        Returns:
            Pairs of the index of a prompt and a piece of its text, as they come.

        Raises:
            UsageError: The artifact is no decoder, or an argument is out of range; at once, and it
                names the prompt.
        """
        draw = (temperature, top_k, top_p)
        asks = batch.asks_of(self, prompts, max_new_tokens, draw, seed, adapter)
        return batch.generate_text(self, asks, stop_at_eos, stats)

    def token_logprobs(
        self, ids: Sequence[int] | npt.NDArray[Any], *, adapter: str | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the log-probability of each token but the first, given those before it.

        Teacher-forced; `exp(-mean)` is the perplexity per token. Log-softmax in float64.

        Args:
            ids: `[n]` tokens, 2 to the decoder's context.
            adapter: Which of the artifact's adapters to use; None: none.

        Returns:
            `[n - 1]` float64: entry i belongs to `ids[i + 1]`. Unit: nats.
        """
        return scores.token_logprobs(self, ids, adapter)
