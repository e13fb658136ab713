"""HySparse folders: eager decoders against the definition in trainable torch, artifacts against both."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.kernels import require_attention
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime import load
from mimo_compile.tiny import hysparse as hy
from mimo_compile.tiny.checkpoint import export
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import TinyModel
from mimo_compile.verify import verify_artifact

NONE = parse_scheme("none")
MICRO = TinyConfig(
    vocab_size=4096,
    hidden_size=32,
    num_hidden_layers=6,
    hybrid_layer_pattern=(0, 1, 1, 0, 1, 0),
    moe_layer_freq=(0, 0, 1, 0, 0, 0),
    head_dim=16,
    v_head_dim=8,
    swa_head_dim=16,
    swa_v_head_dim=8,
    sliding_window=8,
    intermediate_size=32,
    n_routed_experts=4,
    moe_intermediate_size=16,
    mtp_layers=0,
    max_position_embeddings=512,
)
SLOTS = [320, 272, 272, 320, 272, 320]
"""Of each layer's caches for a context of 320: all of it, or the window and a step of 256."""
SHORT = {"num_hidden_layers": 3, "hybrid_layer_pattern": (0, 1, 1), "moe_layer_freq": (0, 0, 0)}
TOKENIZER = (Path(hy.__file__).parent / "tokenizer.json").read_text()


def random_model(block: int, budget: int, **changes) -> hy.HySparseModel:
    """A model whose attention is far from even, with gates and sinks that matter; bf16 numbers."""
    base = TinyModel(replace(MICRO, **changes), torch.float32)
    base.initialise(0)
    model = hy.from_hybrid(base, hy.HySparseShape(block, budget), torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.layers:
            a = layer.self_attn
            for part in (a.q_proj, a.k_proj, a.v_proj, a.o_proj):
                part.weight *= 12.0
            if isinstance(a, hy.SparseAttention):
                a.attention_sink_bias.normal_(generator=draw)
                a.listed_sink_bias.normal_(generator=draw)
                a.listed_gate.weight.normal_(generator=draw)
                a.window_gate.weight.normal_(generator=draw)
        for name, value in model.named_parameters():
            if not name.endswith("router"):
                value.copy_(value.bfloat16())
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function: shape -> (the model, its folder), made once."""
    found = {}

    def get(block=4, budget=12, **changes):
        key = (block, budget, *sorted(changes.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp("hysparse")
            model = random_model(block, budget, **changes)
            hy.export_hysparse(model, TOKENIZER, folder)
            found[key] = model, folder
        return found[key]

    return get


def ids_of(count, seed=0):
    return torch.randint(4096, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def defined(model, ids):
    """Logits ``[T, V]`` of the trainable definition."""
    return model.logits(model(torch.tensor([ids]))[0])[0]


def decoder(folder, context=96, quant=NONE):
    return load_checkpoint(folder, quant, context).decoder


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


# -- eager -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "budget"), [(4, 12), (16, 32), (32, 32), (1, 10), (4, 400)])
def test_eager_decoders_are_the_definition(made, block, budget):
    model, folder = made(block, budget)
    ids = ids_of(80)
    want = defined(model, ids)
    near(decoder(folder).prefill(ids)[1], want)
    if budget < len(ids):  # and what was chosen matters
        near_dense = defined(hy_with(model, budget=416), ids)
        assert (near_dense - want).abs().max() > 1e-2 * want.abs().max()


def hy_with(model, budget):
    """Return the same model that chooses more."""
    other = hy.HySparseModel(
        model.config, hy.HySparseShape(model.shape.block, budget), torch.float32
    )
    other.load_state_dict(model.state_dict())
    return other


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=4, unique=True), one_by_one=st.integers(0, 6))
def test_a_prompt_in_pieces_is_the_prompt(made, cuts, one_by_one):
    folder = made()[1]
    ids, model = ids_of(60), decoder(folder)
    whole = model.prefill(ids)[1]
    model.reset()
    edges = sorted({0, *cuts, *range(60 - one_by_one, 61)})
    rows = [
        model.forward_step(torch.tensor(ids[a:b]), a, decode=b - a == 1)[1]
        for a, b in itertools.pairwise(edges)
    ]
    near(torch.cat(rows), whole)


def test_across_the_end_of_the_rings(made):
    """Rings hold the window and a step of 256; the full layers' caches hold all."""
    model, folder = made()
    ids, eager = ids_of(300), decoder(folder, 320)
    assert [s.capacity(320) for s in eager.config.layers] == SLOTS
    near(eager.prefill(ids)[1], defined(model, ids))


def test_only_full_layers_hold_the_context(made):
    eager = decoder(made()[1], 320)
    eager.reset()
    owned = {}
    for stage in eager.stages():
        for buffer, name in stage.states.items():
            owned.setdefault(name, stage.module.get_buffer(buffer))
            assert stage.module.get_buffer(buffer) is owned[name]  # followers read the very cache
    assert {name: len(cache) for name, cache in owned.items()} == {
        f"layers.{i}.{part}_cache": slots for i, slots in enumerate(SLOTS) for part in "kv"
    }
    assert [stage.follows for stage in eager.stages() if stage.follows] == [
        (f"layers.{i}.idx", f"layers.{i}.cnt") for i in (0, 0, 3)
    ]
    assert [stage.lends for stage in eager.stages() if stage.lends] == [
        (f"layers.{i}.idx", f"layers.{i}.cnt") for i in (0, 3)
    ]  # the last layer lends to nobody


def by_head(source, folder):
    """Copy a folder with a gate for each head, the first of each head's eight; returns these gates."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    gates = {n: t[::8].contiguous() for n, t in tensors.items() if "_gate.weight" in n}
    save_file(tensors | gates, folder / "model.safetensors")
    edit(folder, gate="head")
    return gates


def test_gates_of_heads_are_gates_of_elements_that_are_equal(made, tmp_path):
    """One number for each head, and the same number for each of a head's values."""
    folders = [tmp_path / width for width in ("head", "element")]
    gates = by_head(made()[1], folders[0])
    shutil.copytree(made()[1], folders[1])
    wide = {n: t.repeat_interleave(8, 0) for n, t in gates.items()}
    save_file(load_file(folders[1] / "model.safetensors") | wide, folders[1] / "model.safetensors")
    ids = ids_of(40)
    near(*(decoder(folder).prefill(ids)[1] for folder in folders))


@pytest.mark.parametrize("block", [4, 32])
def test_kernels_are_looked_for_that_will_be_compiled(made, block, monkeypatch):
    """Attention that scores, or its halves, which the last layer's is, too; lists and rings; nothing else."""
    asked = []
    monkeypatch.setattr(
        "mimo_compile.schedules.schedules_for", lambda work, _: asked.append(work) or [work]
    )
    config = decoder(made(block, 64)[1], 320).config
    require_attention(config, "bf16", local_cpu())
    scored = {"oracle_attention"} if block == 32 else {"score_keys"}
    attended = {"cached_attention", "sparse_attention", "select_blocks"}
    assert {w.op for w in asked} == scored | attended
    dense = [get_op(w.op).full(w) for w in asked if w.op == "cached_attention"]
    assert {(p["cap"], p["window"], p["sink"]) for p in dense} == {(272, 8, 1), (320, 0, 0)}
    assert all(get_op(w.op).full(w).get("c", "bf16") == "bf16" for w in asked)


# -- what is refused -------------------------------------------------------------------------------


def edit(folder, drop=(), top=None, **shape):
    """Change fields of ``hysparse`` in a ``config.json`` (and top-level ones)."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["hysparse"] = {k: v for k, v in (content["hysparse"] | shape).items() if k not in drop}
    file.write_text(json.dumps(content | (top or {})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ("block",)}, r"hysparse\.block is missing.*config\.json"),
        ({"budget": "many"}, r"hysparse\.budget must be an integer.*'many'"),
        ({"budget": 3}, r"hysparse\.budget=3 does not hold a block of 4"),
        ({"budget": 14}, r"hysparse\.budget=14 is not a whole number of blocks of 4.*12 tokens are 3"),
        ({"gate": "row"}, r"hysparse\.gate='row' is not supported"),
        ({"blocks": 4}, "hysparse holds 'blocks'.*block, budget, gate"),
        ({"top": {"hysparse": None}}, "hysparse is missing"),
        ({"top": {"hysparse": 7}}, "hysparse must be an object with block and budget, found 7"),
        ({"top": {"hybrid_layer_pattern": [1, 1, 1, 0, 1, 0]}}, "the first layer is sparse"),
        ({"top": {"hybrid_layer_pattern": [0] * 6}}, "the first layer is full, as are all others"),
        ({"top": {"swa_v_head_dim": 16}}, "sparse layer 1 has .* the full layer that it follows"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_is_said(made, tmp_path, change, message):
    folder = tmp_path / "m"
    shutil.copytree(made()[1], folder)
    edit(folder, **change)
    with pytest.raises(InputError, match=message):
        decoder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.4.self_attn.listed_sink_bias", r"model\.layers\.4\.self_attn\.listed_sink_bias.*missing"),
        ("layers.1.self_attn.window_gate.weight", "window_gate.weight.*missing"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_wrong(made, tmp_path, name, message):
    folder = tmp_path / "m"
    shutil.copytree(made()[1], folder)
    tensors = load_file(folder / "model.safetensors")
    cut = tensors.pop(f"model.{name}")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        decoder(folder)
    save_file(tensors | {f"model.{name}": cut[1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"has shape .* config\.json says"):
        decoder(folder)


@pytest.mark.parametrize("text", ["full", "hysparse", "quest:budget=64", "model+int8"])
def test_no_other_attention(made, text):
    """What the checkpoint says is the only way; its own text is another spelling of ``model``."""
    folder = made()[1]
    own = decoder(folder).config.attention
    assert load_checkpoint(folder, NONE, 96, attention=own).decoder.config.attention == own
    with pytest.raises(UsageError, match="were trained with hysparse:block=4,budget=12,window=8"):
        load_checkpoint(folder, NONE, 96, attention=parse_policy(text))


def test_what_cannot_be_compiled_is_said(made):
    folder = made()[1]
    with pytest.raises(UsageError, match="reads keys of single positions, which kv4 caches"):
        mc.compile(folder, quant="kv4")
    with pytest.raises(UsageError, match="--batch 2 has no kernels for"):
        mc.compile(folder, max_context=16, batch=2)
    with pytest.raises(UsageError, match="layers of a hysparse model read the caches of others"):
        mc.compile(folder, quant="w8a8", calibrate="gptq")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function: names of base, delta and output -> what the command complains of; and the delta."""
    base = TinyModel(MICRO, torch.float32)
    base.initialise(3)
    export(base, TOKENIZER, tmp_path / "base")
    model = hy.from_hybrid(base, hy.HySparseShape(4, 12), torch.float32)
    hy.save_hysparse(model, tmp_path / "delta", "base")

    def call(base="base", delta="delta", out="out"):
        named = {"--base": base, "--delta": delta, "--out": out}
        words = [w for flag, name in named.items() for w in (flag, str(tmp_path / name))]
        monkeypatch.setattr("sys.argv", ["x", *words])
        try:
            hy.main()
        except SystemExit:
            return capsys.readouterr().err
        return ""

    return call


def test_the_command_makes_a_folder(command, tmp_path):
    assert not command()
    assert decoder(tmp_path / "out").config.attention.budget == 12


def test_the_command_keeps_its_base(command, tmp_path):
    """It is no output folder, by whatever name; what the command made is no base."""
    kept = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    assert "is the base model's folder" in command(out="base/../base")
    assert kept == {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    assert not command()
    assert "model_type is 'hysparse', not 'mimo_v2_flash'" in command(base="out", out="other")
    assert not (tmp_path / "other").exists()


def test_the_command_says_what_is_wrong_with_a_delta(command, tmp_path):
    tensors = load_file(tmp_path / "delta")
    lists = {"hysparse": '{"block": 4, "budget": 12}'}
    name = "model.layers.1.self_attn.listed_gate.weight"
    cut = tensors | {name: tensors[name][1:].contiguous()}
    less = {n: t for n, t in tensors.items() if n != name}
    for stored, meta, message in (
        (tensors, None, "hold no 'hysparse' of block and budget: None"),
        (tensors, {"hysparse": '{"block": 4}'}, "hold no 'hysparse' of block and budget"),
        (tensors, {"hysparse": '{"block": 4, "budget": 13}'}, "budget=13 is no whole number"),
        (tensors, {"hysparse": "many"}, "give no model"),
        (cut, lists, f"{name} has shape [31, 32], the base model needs [32, 32]"),
        (less, lists, f"{name} is missing"),
    ):
        save_file(stored, tmp_path / "bad", metadata=meta)
        assert message in " ".join(command(delta="bad").split())
    assert "give no model" in command(delta="none")


# -- compiled --------------------------------------------------------------------------------------


def prove(folder, model, tmp_path, context=96, quant="none"):
    """Compile, save, verify, load; logits are those of the definition where nothing is quantised."""
    path = mc.compile(folder, quant=quant, db=tmp_path / "r.db", max_context=context).save(
        tmp_path / "m.mimo"
    )
    found = verify_artifact(path, source=folder, text=Path(hy.__file__).read_text())
    assert found.ok and found.end_to_end is not None and not found.notes
    module = load(path)
    if quant == "none":
        ids = ids_of(min(context, 290))
        want = torch.log_softmax(defined(model, ids).double(), -1)[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(
            torch.from_numpy(module.token_logprobs(ids)).double(), want, atol=2e-3, rtol=1e-3
        )
    return module


@pytest.mark.slow
@pytest.mark.compile
def test_compiled(made, tmp_path):
    """Prompt, decode, prefix reuse and going back; only the full layer holds the context."""
    model, folder = made(4, 12, **SHORT)
    module = prove(folder, model, tmp_path)
    layers = module.manifest.decoder.layers
    assert [(x.role, x.follows, x.window) for x in layers] == [
        ("select", "", 0), ("reuse", "layers.0", 8), ("reuse", "layers.0", 8),
    ]  # fmt: skip
    assert all(name.startswith(x.name) for x in layers for name in x.states)
    assert module.manifest.attention == "hysparse:block=4,budget=12,window=8"
    assert module.manifest.decoder.decode == ()
    ids, other = ids_of(70), [*ids_of(70)[:40], *ids_of(20, seed=5)]
    session = module.session()
    session.append(ids)
    session.rewind(50)
    again = [session.append(ids[50:])]
    assert session.keep_prefix(other) == 40
    again.append(session.append(other[40:]))
    for got, whole in zip(again, (ids, other), strict=True):
        want = module.session().append(whole)
        assert abs(got - want).max() <= 1e-4 * abs(want).max()


def with_gates(model, gates):
    """Return the same model whose gates of elements are these of heads."""
    other = hy_with(model, model.shape.budget)
    wide = {n.removeprefix("model."): t.float().repeat_interleave(8, 0) for n, t in gates.items()}
    missing = other.load_state_dict(wide, strict=False)
    assert not missing.unexpected_keys and len(wide) == 4
    return other


@pytest.mark.slow
@pytest.mark.compile
def test_gates_of_heads_compiled_beyond_the_rings(made, tmp_path):
    """When rings have gone round: how far back sessions go, what they keep of another text, single tokens."""
    model, folder = made(4, 12, **SHORT)
    model = with_gates(model, by_head(folder, tmp_path / "head"))
    module = prove(tmp_path / "head", model, tmp_path, 320)
    assert [x.slots for x in module.manifest.decoder.layers] == SLOTS[:3]
    ids, far = ids_of(310), ids_of(310, seed=7)
    session = module.session()
    session.append(ids)
    # the last 272 positions, of which the first 7 are only seen
    assert [n for n in range(311) if session.can_rewind(n)] == [0, *range(45, 311)]
    with pytest.raises(UsageError, match="cannot go back from 310 tokens to 44"):
        session.rewind(44)
    session.rewind(45)
    pairs = [(session.append(ids[45:]), ids)]
    near_text = [*ids[:200], *far[200:290]]
    assert session.keep_prefix(near_text) == 200
    pairs.append((session.append(near_text[200:]), near_text))
    for token in far[290:300]:
        last = session.append([token], decode=True)
    pairs.append((last, [*near_text, *far[290:300]]))
    start = [*ids[:30], *far[30:280]]  # its end was overwritten
    assert session.keep_prefix(start) == 0
    pairs.append((session.append(start), start))
    for got, text in pairs:
        want = module.session().append(text)
        assert abs(got - want).max() <= 1e-4 * abs(want).max()


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(
    ("block", "budget", "quant"),
    [(32, 64, "none"), (4, 12, "none"), (1, 10, "none"), (16, 32, "kv16"), (4, 12, "w8a8")],
)
def test_every_shape_compiled(made, tmp_path, block, budget, quant):
    model, folder = made(block, budget)
    manifest = prove(folder, model, tmp_path, 320, quant).manifest
    assert [x.slots for x in manifest.decoder.layers] == SLOTS
    assert sorted(manifest.states) == sorted(
        f"layers.{i}.{n}_cache" for i in range(6) for n in "kv"
    )
    fused = {c.schedule for c in manifest.plan if c.workload.startswith("oracle_attention")}
    assert all(".x86_fused" in name for name in fused) and bool(fused) == (block >= 16)
