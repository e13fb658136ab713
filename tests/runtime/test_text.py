"""Streaming text: the pieces are the text, and none ends within a character."""

import pytest
import runtime_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.runtime.text import TextStream

tokenizers = pytest.importorskip("tokenizers")

BYTES = tokenizers.Tokenizer.from_str(runtime_samples.tokenizer_json().decode())
SENTENCE = tokenizers.Tokenizer(
    tokenizers.models.BPE(
        {"\u2581": 0, "a": 1, "\u2581b": 2, "<0xE4>": 3, "<0xB8>": 4, "<0x96>": 5},
        [],
        byte_fallback=True,
    )
)
SENTENCE.decoder = tokenizers.decoders.Sequence(
    [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
)


def whole(tokenizer, before: list[int], ids: list[int]) -> str:
    start = len(tokenizer.decode(before))
    return tokenizer.decode(before + ids)[start:]


@settings(max_examples=150)
@given(before=st.text(max_size=12), text=st.text(max_size=60))
def test_pieces_add_up_to_the_text(before: str, text: str) -> None:
    stream = TextStream(BYTES, BYTES.encode(before).ids)
    pieces = list(stream.pieces(iter(BYTES.encode(text).ids)))
    # a U+FFFD of the text itself cannot be told from a cut at its very end
    assert "".join(pieces) == text.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 255), max_size=100))
def test_bytes_that_are_no_text_come_as_the_decoder_has_them(ids: list[int]) -> None:
    found = "".join(TextStream(BYTES).pieces(iter(ids)))
    text = BYTES.decode(ids)
    assert found == text.rstrip("\ufffd")


@settings(max_examples=150)
@given(
    before=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    ids=st.lists(
        st.sampled_from([[0], [1], [2], [3, 4, 5]]), max_size=60
    ).map(lambda parts: [i for part in parts for i in part]),
)  # fmt: skip
def test_leading_spaces_and_byte_tokens(before: list[int], ids: list[int]) -> None:
    found = "".join(TextStream(SENTENCE, before).pieces(iter(ids)))
    assert found == whole(SENTENCE, before, ids)


def test_an_incomplete_character_at_the_end_is_left_out() -> None:
    ids = BYTES.encode("a世").ids
    assert list(TextStream(BYTES).pieces(iter(ids))) == ["a", "世"]
    assert list(TextStream(BYTES).pieces(iter(ids[:-1]))) == ["a"]


def test_garbage_is_not_waited_for_forever() -> None:
    bad = BYTES.encode("\xe9").ids[:1]  # a first byte without its second
    stream = TextStream(BYTES)
    pieces = [stream.add(token) for token in bad * 1000 + BYTES.encode("end").ids]
    assert "".join(pieces) == "\ufffd" * 1000 + "end"
    assert len(stream._ids) <= 200


def test_special_tokens_have_no_text() -> None:
    ids = [*BYTES.encode("ab").ids, runtime_samples.EOS, *BYTES.encode("c").ids]
    assert list(TextStream(BYTES).pieces(iter(ids))) == ["a", "b", "c"]
