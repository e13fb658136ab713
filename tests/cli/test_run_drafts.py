"""`run --speculative`: what it refuses, and what it says of drafts."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from mimo_compile.cli.run_drafts import draft_figures
from mimo_compile.errors import UsageError
from mimo_compile.runtime import Speculation, Stats
from mimo_compile.runtime.program import Decoder, Layer
from mimo_compile.runtime.speculate import doubt, speculation_of

DECODER = Decoder(
    (1, 4), (1, 4), 8, 16, 64, mtp=2, mtp_steps=(1, 4), layers=(Layer("layers.0"),), alike=(1, 4)
)


def asked(how=True, **changes):
    manifest = SimpleNamespace(name="m", attention="quest:budget=64")
    decoder = msgspec.structs.replace(DECODER, **changes)
    return speculation_of(SimpleNamespace(manifest=manifest), decoder, how)


def test_what_cannot_draft_or_verify_is_refused():
    assert asked() == Speculation() and asked(False) is None
    for changes, why in (
        ({"mtp": 0}, "no draft heads"),
        (
            {"decode": (1,)},
            "under --attention quest:budget=64 generated tokens are read one at a time",
        ),
        ({"layers": ()}, "compiled by a version"),
    ):
        with pytest.raises(UsageError, match=why):
            asked(**changes)
    for depth in (0, 3, "2"):
        with pytest.raises(UsageError, match=r"drafts cannot be made|whole number"):
            asked(Speculation(depth))


def test_doubts_name_what_adds_up_in_another_order():
    assert not doubt(DECODER)
    assert "different orders" in doubt(msgspec.structs.replace(DECODER, alike=()))
    assert "moe:t=1" in doubt(msgspec.structs.replace(DECODER, alike=(), unlike=("moe:t=1",)))
    assert doubt(msgspec.structs.replace(DECODER, steps=(1, 2, 4), alike=(1, 2)))
    assert doubt(msgspec.structs.replace(DECODER, steps=(1, 2, 4), alike=(1, 4)))
    assert not doubt(msgspec.structs.replace(DECODER, steps=(1,), alike=()))


def test_figures_of_drafts():
    stats = Stats(passes=4, drafted=[4, 3, 0], judged=[4, 2, 0], accepted=[2, 1, 0])
    assert draft_figures(stats) == ["1.75 tokens/pass, drafts accepted 50 % 50 %"]
    assert stats.acceptance["heads"][2] == {"drafted": 0, "judged": 0, "accepted": 0, "rate": None}
    assert draft_figures(Stats()) == []


def test_flags_that_do_not_go_together(cli, decoder_file):
    told = cli("run", decoder_file, "--prompt", "a", "--draft-depth", "2")
    assert told.code == 2 and "give both, or neither" in told.error
    told = cli("run", decoder_file, "--prompt", "a", "--prompt", "b", "--speculative")
    assert told.code == 2 and "one --prompt" in told.error
    told = cli("run", decoder_file, "--prompt", "a", "--speculative")
    assert told.code == 2 and "has no draft heads" in told.error
