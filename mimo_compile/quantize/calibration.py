"""What ``--calibrate METHOD[:TEXT_FILE]`` says, and the token sequences that come from it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import InputError, UsageError
from mimo_compile.runtime.program import Calibrated

Method = Literal["rtn", "gptq", "awq"]
_LARGEST_TEXT = 1 << 28
"""Bytes of a text file beyond which it is refused."""
_PER_FILE = 4
"""Most sequences of one standard-library module."""
_TOKENS, _LEAST, _MOST = 16, 16, 128
"""Tokens for each hidden channel, and limits of the number of sequences."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How quantised codes are chosen."""

    method: Method = "rtn"
    text: Path | None = None
    """File of calibration text; None: standard-library modules that the built-in model was trained on."""
    sequences: int | None = None
    """None: as many as make 16 tokens for each hidden channel, at least 16 and at most 128."""
    length: int = 512
    """Tokens of a sequence, at most the model's context."""
    seed: int = 0
    """Decides which parts of the text are taken."""
    log: Callable[[str], None] = field(default=lambda text: None, compare=False, repr=False)
    """Told what goes on."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.method not in get_args(Method):
            raise _unknown(self.method)
        if (self.sequences is not None and self.sequences < 1) or self.length < 2:
            raise UsageError("calibration needs at least one sequence of two tokens")


def parse_calibration(
    text: str, *, seed: int = 0, log: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Parse ``METHOD[:TEXT_FILE]``: ``rtn``, ``gptq``, ``awq:book.txt``.

    Raises:
        UsageError: another method, or a file for ``rtn``.
    """
    method, colon, file = text.partition(":")
    if method not in get_args(Method) or (colon and not file):
        raise _unknown(text)
    if file and method == "rtn":
        raise UsageError("--calibrate rtn rounds without any text", remedy="leave the file out")
    return Calibration(cast(Method, method), Path(file) if file else None, seed=seed, log=log)


def _unknown(text: str) -> UsageError:
    return UsageError(
        f"unknown calibration {text!r} (--calibrate)",
        remedy="use rtn, gptq or awq, the latter two with an optional text file: gptq:book.txt",
    )


def token_sequences(
    calibration: Calibration, tokenizer: bytes | None, vocab: int, hidden: int, max_context: int
) -> Tensor:
    """Return the calibration tokens ``int32 [S, L]``.

    Args:
        calibration: which text, how much of it.
        tokenizer: ``tokenizer.json`` of the model.
        vocab: ids are below this.
        hidden: channels of the residual stream, which decide how many sequences there are by default.
        max_context: upper limit of L.

    Raises:
        InputError: no tokenizer, a file that is missing, too large, no UTF-8, or too short.
    """
    if tokenizer is None:
        raise InputError(
            f"--calibrate {calibration.method} needs a tokenizer, and the model has none",
            file="tokenizer.json",
            remedy="Put tokenizer.json beside the weights, or use --calibrate rtn",
        )
    from tokenizers import Tokenizer

    coder = Tokenizer.from_str(tokenizer.decode("utf-8"))
    length = min(calibration.length, max_context)
    rng = np.random.default_rng(calibration.seed)
    count = calibration.sequences or min(_MOST, max(_LEAST, -(-_TOKENS * hidden // length)))
    if calibration.text is None:
        found = _library(coder, length, count, rng)
    else:
        found = _file(coder, calibration.text, length, count, rng)
    if found.max() >= vocab:
        raise InputError(
            f"the tokenizer gives the token {found.max()}, the model has {vocab}",
            file="tokenizer.json",
        )
    return torch.from_numpy(found)


def repeat_calibration(
    record: Calibrated | None, asked: Calibration | None, log: Callable[[str], None]
) -> Calibration | None:
    """Return the calibration that an artifact records (None: there was none); a file has to be given again.

    Raises:
        UsageError: another method or text was asked for, or the file is needed.
    """
    method = "rtn" if record is None else record.method
    if asked is not None and asked.method != method:
        raise UsageError(
            f"the artifact's codes were chosen by {method}, not {asked.method} (--calibrate)",
            remedy="leave --calibrate out",
        )
    if record is None:
        return None
    text = None if asked is None else asked.text
    if record.text and text is None:
        raise UsageError(
            f"the artifact was calibrated on the text of {record.text}, which is needed again",
            remedy=f"give --calibrate {method}:path/to/{record.text}",
        )
    if text is not None and not record.text:
        raise UsageError(
            "the artifact was calibrated on sources of the standard library, not on a file",
            remedy="leave --calibrate out",
        )
    again = cast(Method, record.method)
    return Calibration(again, text, record.sequences, record.length, record.seed, log)


def fingerprint(ids: Tensor) -> str:
    """Return the SHA-256 of calibration tokens, which says whether two calibrations had the same text."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def describe(calibration: Calibration) -> str:
    """Return what the text is, for messages."""
    if calibration.text is not None:
        return str(calibration.text)
    version = ".".join(map(str, sys.version_info[:3]))
    return f"sources of Python {version}'s standard library, without those held out for judging"


def _library(coder: Any, length: int, sequences: int, rng: np.random.Generator) -> Any:
    """Take sequences from modules in random order, none of them held out."""
    from mimo_compile.tiny import corpus

    files = corpus.collect().train
    picked: list[Any] = []
    for _ in range(sequences):  # short libraries are gone through again
        for i in rng.permutation(len(files)):
            ids = np.asarray(coder.encode(files[i].text, add_special_tokens=False).ids, np.int32)
            for start in _starts(len(ids), length, _PER_FILE, rng):
                picked.append(ids[start : start + length])
                if len(picked) == sequences:
                    return np.stack(picked)
        if not picked:
            break
    raise InputError("the standard library has no module that is long enough", file=sys.prefix)


def _file(coder: Any, path: Path, length: int, sequences: int, rng: np.random.Generator) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise InputError("the calibration text is not a regular file", file=path)
        if path.stat().st_size > _LARGEST_TEXT:
            raise InputError(
                f"the calibration text has more than {_LARGEST_TEXT >> 20} MiB",
                file=path, remedy="A few megabytes are plenty",
            )  # fmt: skip
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the calibration text cannot be read: {error}", file=path) from error
    ids = np.asarray(coder.encode(text, add_special_tokens=False).ids, np.int32)
    if len(ids) < length:
        raise InputError(
            f"the calibration text has {len(ids)} tokens, one sequence has {length}",
            file=path, remedy="Give a longer text",
        )  # fmt: skip
    return np.stack([ids[s : s + length] for s in _starts(len(ids), length, sequences, rng)])


def _starts(total: int, length: int, most: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield starts of up to ``most`` sequences that do not overlap, at a random offset, in random order."""
    count = total // length
    if count == 0:
        return
    offset = int(rng.integers(total - count * length + 1))
    for i in rng.permutation(count)[:most]:
        yield offset + int(i) * length


__all__ = [
    "Calibration",
    "Method",
    "describe",
    "fingerprint",
    "parse_calibration",
    "repeat_calibration",
    "token_sequences",
]
