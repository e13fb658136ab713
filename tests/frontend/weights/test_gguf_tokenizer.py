"""Tokenizers in GGUF files: the same ids and texts as the one they were written from."""

import itertools
import json

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mimo_compile.frontend.weights.gguf.checkpoint import Gguf
from mimo_compile.frontend.weights.gguf.reader import GgufFile
from mimo_compile.frontend.weights.gguf.tokenizer import tokenizer_json

pytestmark = pytest.mark.compile
CORPUS = [
    "the cat sat on the mat, and the dog sat on the cat!", "def f(x):\n    return x * 1234 + 56",
    "Größe, naïve, 日本語 and 🙂; it's we'll\r\n\r\n  tabs\tand   spaces ",
] * 4  # fmt: skip
TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "\n\n",
    "unseen: ½ œ 𝕏 12345678",
    "a<|end|>the",
    "the the  the   the",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def through_a_file(kit, tmp_path, **fields):
    path = tmp_path / "m.gguf"
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    metadata["llama.block_count"] = 1
    table = {"token_embd.weight": kit.floats_of(torch.ones(8, kit.HIDDEN))}
    kit.write_gguf(path, kit.gguf_metadata(**metadata), table)
    return GgufFile(path)


def byte_level(split):
    """Train a small tokenizer."""
    made = Tokenizer(models.BPE(ignore_merges=split is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    made.add_tokens([AddedToken("dog sat", normalized=False)])
    return made


def fields_of(made, pre):
    model = json.loads(made.to_str())["model"]
    count = made.get_vocab_size()
    types = [1] * (count - 3) + [3, 3, 4]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = [made.id_to_token(i) for i in range(count)]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types}


@pytest.mark.parametrize(("pre", "split"), [("llama-bpe", SPLIT), ("gpt-2", None)])
def test_byte_level(kit, tmp_path, pre, split):
    made = byte_level(split)
    begin = made.token_to_id("<|begin|>")
    file = through_a_file(kit, tmp_path, **fields_of(made, pre), bos_token_id=begin)
    found = Tokenizer.from_str(tokenizer_json(file).decode())
    first = [begin] if pre == "llama-bpe" else []
    for text in TEXTS:
        ids = made.encode(text).ids
        assert found.encode(text).ids == first + ids
        assert found.encode(text, add_special_tokens=False).ids == ids
        assert found.decode(first + ids) == made.decode(ids)


def test_qwen2_splits_digits_and_composes(kit, tmp_path):
    made = byte_level(None)
    found = Tokenizer.from_str(
        tokenizer_json(through_a_file(kit, tmp_path, **fields_of(made, "qwen2"))).decode()
    )
    assert found.encode("e\u0301").ids == found.encode("\u00e9").ids
    words = [w for w, _ in found.pre_tokenizer.pre_tokenize_str("abc 1234")]
    assert words == ["abc", "Ġ", "1", "2", "3", "4"]
    assert all(found.decode(found.encode(t).ids) == t for t in ("it's 1234", "日本語\n\n x"))


SCORES = {
    "▁": -1.0, "t": -2.0, "h": -3.0, "e": -4.0, "c": -5.0, "a": -6.0, "he": -7.0, "▁t": -8.0,
    "the": -8.5, "▁the": -9.0, "th": -10.0, "at": -11.0, "cat": -12.0, "▁c": -13.0, "▁cat": -14.0,
}  # fmt: skip


def merged(text):
    """Encode as SentencePiece does: join the neighbours whose union scores best, leftmost first."""
    parts = []
    for c in "▁" + text.replace(" ", "▁"):
        parts += [c] if c in SCORES else [f"<0x{b:02X}>" for b in c.encode()]
    while True:
        pairs = [
            (-SCORES[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in SCORES
        ]  # fmt: skip
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_pieces(kit, tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SCORES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(SCORES)
    scores = [0.0] * 259 + list(SCORES.values())
    file = through_a_file(
        kit, tmp_path, model="llama", tokens=tokens, token_type=types, scores=scores,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = Tokenizer.from_str(tokenizer_json(file).decode())
    for text in ("the cat", "thecat at the the", "he that  the", "é 日 x the", "a"):
        encoded = found.encode(text)
        assert encoded.tokens == ["<s>", *merged(text)]
        assert found.decode(encoded.ids) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "rwkv"}, "its kind is 'rwkv'"),
        ({"pre": "deepseek-llm"}, "way to split text is 'deepseek-llm'"),
        ({"merges": ["x y z", "q"]}, "it is damaged"),
        ({"merges": [b"\xff\xfe", "a b"]}, "merges are missing"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "two of its tokens are equal"),
        ({"tokens": [b"\xff", "a"]}, "no texts"),
        ({"token_type": [1, 1]}, "not one for each"),
        ({"bos_token_id": 4_000_000_000, "add_bos_token": True}, "is none of"),
    ],
)
def test_what_cannot_be_used_leaves_the_ids(kit, tmp_path, changes, words):
    fields = {**fields_of(byte_level(None), "gpt-2"), **changes}
    file = through_a_file(kit, tmp_path, **fields)
    with pytest.raises(ValueError, match=words):
        tokenizer_json(file)
    checkpoint = Gguf(file.path, {})
    assert checkpoint.tokenizer_json() is None
    assert "only ids" in checkpoint.notes[0] and words.split()[-1] in checkpoint.notes[0]
