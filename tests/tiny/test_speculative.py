"""The built-in model with its three draft heads: greedy texts of 2,000 tokens are those without drafts."""

from __future__ import annotations

import json

import pytest

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.runtime import Speculation, Stats

PROMPT = "import os\n\n\ndef walk(top):\n"


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("quant", ["w8a8", "w4g64a8kv4"])
def test_greedy_texts_of_two_thousand_tokens(quant, tmp_path, capsys):
    path = tmp_path / "t.mimo"
    mc.compile("tiny", quant=quant, db=tmp_path / "r.db").save(path)
    module = mc.load(path)
    assert module.manifest.decoder.alike == (1, 4)
    ids, stats = module.tokenizer.encode(PROMPT).ids, Stats()
    plain = list(module.generate_ids(ids, 2000, stop_at_eos=False))
    for how in (True, Speculation(1), Speculation(3)):
        found = module.generate_ids(ids, 2000, stop_at_eos=False, speculative=how, stats=stats)
        assert list(found) == plain
        assert len(plain) == stats.new_tokens == 1 + stats.passes + sum(stats.accepted)
    # a text that repeats itself meets the third head at one place of its period, always right or wrong
    rates = [head["rate"] for head in stats.acceptance["heads"]]
    assert min(rates[:2]) > 0.5 and stats.acceptance["tokens_per_pass"] > 1.8
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "stop_at_eos": False}
    text = list(module.generate_ids(ids, 300, **drawn))
    assert list(module.generate_ids(ids, 300, speculative=True, **drawn)) == text

    assert main(["run", str(path), "--prompt", PROMPT, "--speculative", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["acceptance"]
    assert told["exact"] and len(told["heads"]) == 3 and told["tokens_per_pass"] > 1
