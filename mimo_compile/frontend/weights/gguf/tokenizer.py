"""The tokenizer in a GGUF file's metadata, as a ``tokenizer.json`` of the package `tokenizers`.

``gpt2``: byte-level BPE with its merges; how text is split first depends on ``tokenizer.ggml.pre``.
``llama``: SentencePiece's BPE, whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mimo_compile.frontend.weights.gguf.reader import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_MAX_PIECE = 128
"""Characters of the longest piece that is taken apart into merges."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _WORDS % "{1,3}" + _SPACES,
    "qwen2": _WORDS % "" + _SPACES,
    "gpt-2": None,
}
"""Known ways to split text before merging (None: the one built into byte-level BPE)."""


def tokenizer_json(file: GgufFile) -> bytes:
    """Return the tokenizer.

    Raises:
        ValueError: it is of a kind that is not known, or damaged; says which.
    """
    from tokenizers import Tokenizer

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its kind is {kind!r}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise ValueError("its tokens are no texts")
    if len(set(tokens)) != len(tokens):
        raise ValueError("two of its tokens are equal")
    types = _numbers(file, "token_type", len(tokens), _NORMAL)
    made = _byte_level(file, tokens) if kind == "gpt2" else _pieces(file, tokens, types)
    made["added_tokens"] = [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": bool(types[i] == _CONTROL),
        }
        for i in range(len(tokens)) if types[i] in (_CONTROL, _USER, _UNKNOWN)
    ]  # fmt: skip
    made["post_processor"] = _first_token(file, tokens, kind) or made["post_processor"]
    made |= {"version": "1.0", "truncation": None, "padding": None}
    text = json.dumps(made)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(f"it is damaged: {error}") from error
    return text.encode()


def _numbers(file: GgufFile, name: str, count: int, default: int) -> Any:
    found = file.metadata.get(f"tokenizer.ggml.{name}")
    if found is None:
        return np.full(count, default)
    if not isinstance(found, np.ndarray) or found.shape != (count,):
        raise ValueError(f"its {name} are not one for each of {count} tokens")
    return found


def _bpe(vocab: dict[str, int], merges: list[str] | list[tuple[str, str]], **more: Any) -> Any:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": merges, **more,
    }  # fmt: skip


def _byte_level(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    pre = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _SPLITS:
        raise ValueError(f"its way to split text is {pre!r} (known: {', '.join(_SPLITS)})")
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise ValueError("its merges are missing")
    split = _SPLITS[pre]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = split is None
    first = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": level
        if split is None
        else {"type": "Sequence", "pretokenizers": [first, level]},
        "post_processor": level,
        "decoder": level,
        "model": _bpe(vocab, merges, ignore_merges=pre == "llama-bpe"),
    }


def _pieces(file: GgufFile, tokens: list[str], types: Any) -> dict[str, Any]:
    scores = _numbers(file, "scores", len(tokens), 0).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    vocab = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for i in np.flatnonzero(types == _NORMAL).tolist():
        piece = tokens[i]
        for cut in range(1, len(piece) if len(piece) <= _MAX_PIECE else 0):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right, piece[:cut], piece[cut:]))
    found.sort()
    unknown = np.flatnonzero(types == _UNKNOWN).tolist()
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(
            vocab,
            [(left, right) for *_, left, right in found],
            unk_token=tokens[unknown[0]] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool((types == _BYTE).any()),
        ),
    }


def _first_token(file: GgufFile, tokens: list[str], kind: str) -> dict[str, Any] | None:
    """Return the template that puts the first token in front, if the file asks for it."""
    first = file.metadata.get("tokenizer.ggml.bos_token_id")
    pre = file.metadata.get("tokenizer.ggml.pre")
    wanted = file.metadata.get(
        "tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe"
    )
    if wanted is not True or type(first) is not int:
        return None
    if not 0 <= first < len(tokens):
        raise ValueError(f"its first token {first} is none of {len(tokens)}")
    text = tokens[first]
    start = {"SpecialToken": {"id": text, "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [start, sequence[0]],
        "pair": [start, *sequence],
        "special_tokens": {text: {"id": text, "ids": [first], "tokens": [text]}},
    }
