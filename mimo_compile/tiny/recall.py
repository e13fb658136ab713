"""Long texts whose ends need their beginnings: code, and code with something to remember in it.

Every sample is exactly as long as asked for. Kinds:

* `code`: a slice of the joined files;
* `needles`: code with lines ``# note: KEY SEP VALUE`` strewn into it; later (or at the end) lines
  ``# recall: KEY SEP`` ask for the value of one of them;
* `pairs`: lines ``KEY SEP VALUE`` where keys come back at any distance (multi-query associative
  recall);
* `copy`: a piece of code that stands in the text a second time, under a comment that says so.

Keys and values are random words out of the tokenizer's vocabulary, drawn anew for each sample, so
no model can know an answer that it does not look up. What cannot be foreseen (keys, values where
they are first said) is labelled 0 and not learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mimo_compile.tiny.corpus import Tokens

CODE, ANSWER = 1, 2
"""Labels of tokens: ordinary text, and text that has to be looked up; 0: neither."""
KINDS = ("code", "needles", "pairs", "copy")
SEPARATORS = ("", " =", " is", ":")
KEY_WORDS, VALUE_WORDS = 2, 2
UNCERTAIN = 8
"""First tokens of a copy that do not count as answers: they say which piece is copied."""

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens ``start ... stop - 1`` of a sample that stand somewhere before.

    `depth` is where, as a share of the text before the questions; `distance` how many tokens back.
    """

    start: int
    stop: int
    depth: float
    distance: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One text: ids [n], labels [n] (of each token as a target), what has to be looked up."""

    kind: str
    ids: Tokens
    labels: Labels
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class _Line:
    """Tokens to be put into a text; those from `answer` on are an answer (-1: none are)."""

    ids: list[int]
    answer: int = -1
    fact: int = 0
    """Which of the sample's facts it says or asks for."""


class Vocabulary:
    """The words and phrases that the tasks are written with, as token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        known: dict[str, int] = tokenizer.get_vocab()
        self.words = np.array(
            sorted(i for token, i in known.items() if re.fullmatch("Ġ[a-z]{3,9}", token))
        )
        self.newlines = np.array(sorted(i for token, i in known.items() if "Ċ" in token))
        self._tokenizer = tokenizer
        self.separators = [self.phrase(s) for s in SEPARATORS]
        self.note, self.recall = self.phrase("\n# note:"), self.phrase("\n# recall:")
        self.again, self.line = self.phrase("\n\n# the same again:"), self.phrase("\n")
        if len(self.words) < 64 or not len(self.newlines):
            raise ValueError("the tokenizer has too few words or no line ends")

    def phrase(self, text: str) -> list[int]:
        """Token ids of `text` [n]."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def facts(self, count: int, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        """`count` keys, no two alike, with their values; words of keys return if there are few."""
        needed = count * KEY_WORDS
        if needed <= len(self.words):
            keys = rng.permutation(self.words)[:needed].reshape(count, KEY_WORDS)
        else:
            pool = len(self.words)
            codes = rng.choice(pool * pool, count, replace=False)
            keys = self.words[np.stack([codes // pool, codes % pool], 1)]
        values = rng.choice(self.words, (count, VALUE_WORDS))
        return [(k.tolist(), v.tolist()) for k, v in zip(keys, values, strict=True)]


class Writer:
    """Makes samples out of token streams of code, each stream drawn with its share."""

    def __init__(
        self, tokenizer: Tokenizer, streams: Sequence[Tokens], shares: Sequence[float], seed: int
    ) -> None:
        self.words = Vocabulary(tokenizer)
        self._streams = list(streams)
        self._shares = np.asarray(shares, dtype=np.float64) / sum(shares)
        self.rng = np.random.default_rng(seed)

    def code_ids(self, n: int) -> Tokens:
        """A random slice [n] of one of the streams."""
        stream = self._streams[int(self.rng.choice(len(self._streams), p=self._shares))]
        if len(stream) < n:
            raise ValueError(f"the text has {len(stream)} tokens, {n} are wanted")
        start = int(self.rng.integers(len(stream) - n + 1))
        return stream[start : start + n]

    def sample(self, kind: str, n: int) -> Sample:
        """A training sample [n] of one of `KINDS`."""
        if kind == "code":
            return self.code(n)
        if kind == "needles":
            return self.needles(n, int(self.rng.integers(2, max(4, n // 64))))
        if kind == "pairs":
            return self.pairs(n, int(self.rng.integers(4, max(8, n // 20))))
        if kind == "copy":
            return self.copy(n)
        raise ValueError(f"no kind of sample {kind!r}; choose from {', '.join(KINDS)}")

    def code(self, n: int) -> Sample:
        """Nothing but code."""
        return Sample("code", self.code_ids(n), np.full(n, CODE, np.uint8))

    def needles(
        self, n: int, facts: int, at_end: bool = False, separator: int | None = None
    ) -> Sample:
        """Code with `facts` notes in it, each asked for once.

        With `at_end` the notes stand at even depths and all questions, in any order, at the end of
        the text; without, everything stands anywhere (each note before its question).
        """
        w, rng = self.words, self.rng
        sep = w.separators[self._separator(separator)]
        said, asked = [], []
        for i, (key, value) in enumerate(w.facts(facts, rng)):
            said.append(_Line(w.note + key + sep + value, -1, i))
            before = w.recall + key + sep
            asked.append(_Line(before + value, len(before), i))
        space = n - sum(len(line.ids) for line in said + asked)
        if space < facts:
            raise ValueError(f"{facts} notes do not fit into {n} tokens")
        code = self.code_ids(space)
        if at_end:
            places = ((np.arange(facts) + rng.random(facts)) / facts * space).astype(int)
            lines = [(int(p), line) for p, line in zip(places, said, strict=True)]
            lines += [(space, asked[int(i)]) for i in rng.permutation(facts)]
        else:
            places = np.sort(rng.integers(0, space + 1, (facts, 2)), axis=1)
            lines = [(int(p[0]), line) for p, line in zip(places, said, strict=True)]
            lines += [(int(p[1]), line) for p, line in zip(places, asked, strict=True)]
        return self._strewn("needles", code, lines, len(said[0].ids))

    def pairs(
        self, n: int, facts: int, at_end: bool = False, separator: int | None = None
    ) -> Sample:
        """`facts` pairs in lines, and lines that repeat one of those before; code before them.

        With `at_end` every pair is said once and then asked for once, in any order; without, new
        and old ones take turns until the text is full.
        """
        w, rng = self.words, self.rng
        sep = w.separators[self._separator(separator)]
        known = w.facts(facts, rng)
        width = len(w.line) + KEY_WORDS + len(sep) + VALUE_WORDS
        if at_end:
            order = [*range(facts), *rng.permutation(facts).tolist()]
        else:
            order = []
            new = 0
            for _ in range(n // width):
                if new < facts and (not new or rng.random() < max(0.3, facts / (n // width))):
                    order.append(new)
                    new += 1
                else:
                    order.append(int(rng.integers(new)))
        if len(order) * width > n:
            raise ValueError(f"{facts} pairs do not fit into {n} tokens")
        code = self.code_ids(n - len(order) * width)
        first: set[int] = set()
        lines = []
        for i in order:
            key, value = known[i]
            before = w.line + key + sep
            answer = len(before) if i in first else -1
            lines.append((len(code), _Line(before + value, answer, i)))
            first.add(i)
        return self._strewn("pairs", code, lines, width)

    def copy(self, n: int, at_end: bool = False) -> Sample:
        """Code in which a piece of an eighth to a quarter of the text stands twice."""
        w, rng = self.words, self.rng
        size = max(2 * UNCERTAIN, int(rng.integers(n // 16, n // 4)))
        rest = n - size - len(w.again)
        code = self.code_ids(rest)
        start = int(rng.integers(0, rest - size))
        starts = np.flatnonzero(np.isin(code[: rest - size], w.newlines))
        if len(starts):
            start = int(starts[np.abs(starts - start).argmin()])
        place = rest if at_end else int(rng.integers(start + size, rest + 1))
        ids = np.concatenate([code[:place], w.again, code[start : start + size], code[place:]])
        labels = np.full(n, CODE, np.uint8)
        begin = place + len(w.again) + UNCERTAIN
        labels[place:begin] = 0
        labels[begin : begin + size - UNCERTAIN] = ANSWER
        answer = Answer(
            begin, place + len(w.again) + size, start / place, place + len(w.again) - start
        )
        return Sample("copy", ids.astype(np.uint16), labels, (answer,))

    def _separator(self, given: int | None) -> int:
        return int(self.rng.integers(len(SEPARATORS))) if given is None else given

    def _strewn(
        self, kind: str, code: Tokens, lines: list[tuple[int, _Line]], width: int
    ) -> Sample:
        """Put lines into code, in the order of their places, each at the next end of a line."""
        ends = np.flatnonzero(np.isin(code, self.words.newlines))
        ids: list[int] = []
        labels: list[int] = []
        said: dict[int, int] = {}
        spans: list[tuple[int, int, int]] = []
        at, last = 0, 0
        for place, line in sorted(lines, key=lambda x: x[0]):
            after = np.searchsorted(ends, place)
            stop = max(at, int(ends[after]) if after < len(ends) and place < len(code) else place)
            ids += code[at:stop].tolist()
            labels += [CODE] * (stop - at)
            at = stop
            if line.answer < 0:
                said[line.fact] = len(ids)
                last = len(ids) + len(line.ids)
                labels += [0] * len(line.ids)
            else:
                begin = len(ids) + line.answer
                spans.append((line.fact, begin, len(ids) + len(line.ids)))
                labels += [0] * line.answer + [ANSWER] * (len(line.ids) - line.answer)
            ids += line.ids
        ids += code[at:].tolist()
        labels += [CODE] * (len(code) - at)
        answers = tuple(
            Answer(begin, stop, said[fact] / max(last, 1), begin - said[fact] - width + VALUE_WORDS)
            for fact, begin, stop in spans
        )
        return Sample(kind, np.asarray(ids, np.uint16), np.asarray(labels, np.uint8), answers)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of equal length: ids [count, n] int64, labels [count, n] uint8, their kinds."""

    ids: Tensor
    labels: Tensor
    kinds: tuple[str, ...]


class Mixture:
    """Endless batches of the kinds, each with its share."""

    def __init__(self, writer: Writer, shares: dict[str, float]) -> None:
        self._writer = writer
        self._kinds = tuple(shares)
        total = sum(shares.values())
        self._shares = np.array([shares[kind] / total for kind in self._kinds])

    def take(self, count: int, n: int) -> Batch:
        """`count` samples of `n` tokens."""
        drawn = self._writer.rng.choice(len(self._kinds), count, p=self._shares)
        samples = [self._writer.sample(self._kinds[int(i)], n) for i in drawn]
        return Batch(
            torch.from_numpy(np.stack([s.ids.astype(np.int64) for s in samples])),
            torch.from_numpy(np.stack([s.labels for s in samples])),
            tuple(s.kind for s in samples),
        )
