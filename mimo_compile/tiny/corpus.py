"""Text for the built-in model: CPython's own standard-library sources, split and tokenised.

Two groups of files are told apart:

* *library*: every module of the standard library except tests, IDLE, lib2to3 and tables;
* *tests*: the `test` packages beside them, used as additional training text only.

About one library file in twenty is held out, chosen by a hash of its relative path, so the
split is the same on every machine that has the same file. Tests of a held-out module are not
trained on either.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096

_TEST_FOLDERS = frozenset({"test", "tests"})
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "__pycache__",
        "_bundled",
    }
)

# A newline with the blank lines and the indentation after it is one piece, so that the common
# indentations become single tokens; a word may carry one leading space or dot.
_PIECES = r"[ \t]*(?:\r?\n[ \t]*)+|[ .]?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file: its path relative to the library folder, and its text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one standard library, split. All three tuples are sorted by path."""

    train: tuple[SourceFile, ...]
    tests: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def is_held_out(path: str, percent: float = 5.0) -> bool:
    """Whether the file at the relative `path` belongs to the held-out split."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100.0 * 2.0**64


def looks_like_table(text: str) -> bool:
    """Whether a file is mostly data (code pages, big literals) rather than code and prose."""
    dense = re.sub(r"\s", "", text)
    letters = sum(c.isascii() and c.isalpha() for c in dense)
    return len(dense) > 4096 and (letters < 0.5 * len(dense) or "decoding_table" in text)


def collect(root: Path | None = None) -> Corpus:
    """Read and split the standard library under `root` (default: the running interpreter's)."""
    root = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
    library: list[SourceFile] = []
    tests: list[SourceFile] = []
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        path = file.relative_to(root)
        folders = set(path.parts[:-1])
        if folders & _SKIPPED_FOLDERS or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        text = text.replace("\r\n", "\n")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip() or digest in seen or looks_like_table(text):
            continue
        seen.add(digest)
        group = tests if folders & _TEST_FOLDERS else library
        group.append(SourceFile(path.as_posix(), text))
    held_out = tuple(f for f in library if is_held_out(f.path))
    held_names = {_subject(f.path) for f in held_out}
    return Corpus(
        train=tuple(f for f in library if not is_held_out(f.path)),
        tests=tuple(f for f in tests if _subject(f.path) not in held_names),
        held_out=held_out,
    )


def _subject(path: str) -> str:
    """`json/encoder.py` and `test/test_encoder.py` both speak about `encoder`."""
    parts = Path(path).with_suffix("").parts
    name = parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1]
    return name.removeprefix("test_").strip("_")


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train a byte-level BPE tokenizer with exactly `vocab_size` ids; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=48,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, files: tuple[SourceFile, ...]) -> Tokens:
    """Token ids of the files, each one preceded by the end-of-text token: [n] uint16."""
    end: int = tokenizer.encode(END_OF_TEXT).ids[0]
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([f.text for f in files], add_special_tokens=False):
        ids.append(end)
        ids.extend(encoding.ids)
    ids.append(end)
    return np.asarray(ids, dtype=np.uint16)


def provenance(corpus: Corpus) -> dict[str, object]:
    """What the text is, in numbers that can be checked on another machine."""

    def size(files: tuple[SourceFile, ...]) -> dict[str, int]:
        return {"files": len(files), "bytes": sum(len(f.text.encode()) for f in files)}

    hashed = hashlib.sha256()
    for file in corpus.train + corpus.tests + corpus.held_out:
        hashed.update(file.path.encode() + b"\0" + file.text.encode() + b"\0")
    return {
        "source": "CPython standard library",
        "licence": "PSF-2.0",
        "python": platform.python_version(),
        "train": size(corpus.train),
        "tests": size(corpus.tests),
        "held_out": size(corpus.held_out),
        "held_out_files": [f.path for f in corpus.held_out],
        "sha256": hashed.hexdigest(),
    }
