"""`--attention seer`: gates of a checkpoint or a file, against transformers with gates written plainly."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from plain_attention import Plain, oracle, run, turn
from safetensors.torch import load_file, save_file

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.trained import gate_record
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.policies import parse_policy
from mimo_compile.verify import check_gates, verify_artifact

BLOCK, WIDTH = 4, 12
CONTEXT, LENGTH, NONE = 96, 60, parse_scheme("none")
TEXT = f"seer:block={BLOCK},gate={WIDTH},budget=12"
PARTS = {"q": "attngate_linear_q", "k": "attngate_linear_k"}
NORMS = {"q_norm": "attngate_qnorm", "k_norm": "attngate_knorm"}


def name_of(layer, part):
    return f"model.layers.{layer}.self_attn.attn_gate.{ {**PARTS, **NORMS}[part] }.weight"


def drawn_gates(config, width=WIDTH, layers=None, seed=0):
    """Return random gates by tensor name; their scores differ by much more than roundings."""
    gen = torch.Generator().manual_seed(seed)
    kv, d = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv
    out = {}
    for i in range(config.num_hidden_layers) if layers is None else layers:
        out[name_of(i, "q")] = torch.randn(kv, group * d, width, generator=gen)
        out[name_of(i, "k")] = torch.randn(kv, 3 * d, width, generator=gen)
        for norm in NORMS:
            out[name_of(i, norm)] = 1 + 0.2 * torch.randn(width, generator=gen)
    return out


@pytest.fixture(scope="module")
def llama(tools, tmp_path_factory):
    """A Llama of two layers with groups of queries, and its folder."""
    folder = tmp_path_factory.mktemp("llama")
    model = tools.make_model("llama", num_hidden_layers=2)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def gates(llama):
    return drawn_gates(llama[0].config)


@pytest.fixture
def file(gates, tmp_path):
    """A file of gates that says what blocks they are for."""
    path = tmp_path / "gates.safetensors"
    save_file(gates, path, metadata={"gates": json.dumps({"block": BLOCK, "width": WIDTH})})
    return path


@pytest.fixture
def folder(llama, gates, tmp_path):
    """A checkpoint that brings its gates, as their authors store queries' matrices."""
    copy = tmp_path / "model"
    shutil.copytree(llama[1], copy)
    config = llama[0].config
    kv = config.num_key_value_heads
    shaped = {
        n: t.view(kv, -1, config.head_dim, WIDTH).contiguous() if PARTS["q"] in n else t
        for n, t in gates.items()
    }
    stored = load_file(copy / "model.safetensors")
    save_file({**stored, **shaped}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def decoder(folder, text, file=None, quant=NONE):
    return load_checkpoint(
        folder, quant, CONTEXT, attention=parse_policy(text), gate_file=file
    ).decoder


class PlainGates(Plain):
    """Blocks by a gate of each KV head, in float64, from keys and queries that are turned back."""

    def __init__(self, policy, model, gates):
        config = model.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        super().__init__(policy, config.num_hidden_layers, heads, kv)
        self.gates = {n: t.double() for n, t in gates.items()}

    def seen(self, layer, q, k, p, decoding):
        every, size, group = list(range(p + 1)), self.p.block, self.heads // self.kv
        if not decoding or layer < self.p.start:
            return [every] * self.heads
        own, out = p // size, []
        for u in range(self.kv):
            raw = turn(q[u * group : (u + 1) * group], [p] * group, back=True)
            query = self.gate(layer, "q", u, raw.flatten(), p)
            scores = {own: 0.0}
            for b in range(own + (p % size == size - 1)):
                at = range(b * size, (b + 1) * size)
                keys = turn(k[u, b * size : (b + 1) * size], list(at), back=True)
                pools = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
                place = at[-1] if self.p.block_pos == "last" else at[0]
                scores[b] = float(query @ self.gate(layer, "k", u, pools, place)) * WIDTH**-0.5
            out += [self.chosen(scores, own, p)] * group
        return out

    def gate(self, layer, part, u, x, position):
        y = x @ self.gates[name_of(layer, part)][u]
        norm = self.gates.get(name_of(layer, f"{part}_norm"))
        if norm is not None:
            y = y / (y.square().mean() + 1e-6).sqrt() * norm
        return turn(y[None], [position])[0]

    def chosen(self, scores, own, p):
        forced = {own, *range(min(self.p.sink, own + 1))}
        if self.p.threshold:
            blocks = sorted(scores)
            soft = torch.softmax(torch.tensor([scores[b] for b in blocks]).double(), 0)
            best = [b for b, s in zip(blocks, soft, strict=True) if s >= self.p.threshold]
        else:
            most = max(1, self.p.budget // self.p.block) - len(forced)
            others = sorted(set(scores) - forced, key=lambda b: -scores[b])
            best = others[: max(0, most)]
        return [
            j for b in sorted({*forced, *best})
            for j in range(b * self.p.block, (b + 1) * self.p.block) if j <= p
        ]  # fmt: skip


@pytest.mark.parametrize(
    "more", [",sink=1,start=1", ",block_pos=last", ",threshold=0.08", ",threshold=1"]
)
def test_eager_decoders_choose_by_their_gates(llama, gates, file, tools, more):
    model, source = llama
    ids, text = tools.prompt(LENGTH), TEXT + more
    got = run(decoder(source, text, file), ids)
    policy = parse_policy(text)
    want = oracle(model, policy, ids, PlainGates(policy, model, gates))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(got, run(decoder(source, "model"), ids), rtol=1e-2, atol=1e-2)


def test_gates_without_norms(llama, gates, tools, tmp_path):
    model, source = llama
    plain = {n: t for n, t in gates.items() if "norm" not in n}
    save_file(plain, tmp_path / "g.safetensors")
    got = run(decoder(source, TEXT, tmp_path / "g.safetensors"), tools.prompt(LENGTH))
    policy = parse_policy(TEXT)
    want = oracle(model, policy, tools.prompt(LENGTH), PlainGates(policy, model, plain))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("more", ["budget=96", "threshold=1e-30"])
def test_enough_budget_is_full_attention(llama, file, tools, more):
    ids = tools.prompt(LENGTH)
    got = run(decoder(llama[1], f"seer:{more}", file), ids)
    want = run(decoder(llama[1], "model"), ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_may_bring_its_gates(folder, llama, file, tools):
    """They do not disturb other policies, and are what a file of them is."""
    ids = tools.prompt(LENGTH)
    tools.edit_json(folder / "config.json", seerattn_gate_block_size=BLOCK)
    own, other = decoder(folder, "seer:budget=12"), decoder(llama[1], "seer:budget=12", file)
    assert own.config.attention == other.config.attention == parse_policy(TEXT)
    torch.testing.assert_close(run(own, ids), run(other, ids), rtol=1e-4, atol=1e-4)
    got, want = (run(decoder(source, "model"), ids) for source in (folder, llama[1]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_prompts_in_pieces_make_the_same_compressed_keys(llama, file, tools):
    ids = torch.tensor(tools.prompt(LENGTH), dtype=torch.int32)
    model = decoder(llama[1], TEXT, file)
    model.prefill(ids.tolist())
    state = model.stage("layers.1").module.get_buffer("desc")
    at_once = state.clone()
    assert at_once[: LENGTH // BLOCK].any(-1).all() and not at_once[LENGTH // BLOCK :].any()
    model.reset()
    for begin, end in ((0, 7), (7, 8), (8, 31), (31, LENGTH)):
        model.forward_step(ids[begin:end], begin)
    torch.testing.assert_close(state, at_once, rtol=1e-5, atol=1e-5)


def test_hybrid_models_need_gates_of_full_layers_only(saved, tmp_path, tools):
    source = saved("mimo_v2_flash")[1]
    windows = decoder(source, "full").config.layers
    full = [i for i, spec in enumerate(windows) if not spec.window]
    gates, gen = {}, torch.Generator().manual_seed(0)
    for i in full:
        s = windows[i]
        shape = (s.kv_heads, s.heads // s.kv_heads * s.d, WIDTH)
        gates[name_of(i, "q")] = torch.randn(shape, generator=gen).bfloat16()
        gates[name_of(i, "k")] = torch.randn(s.kv_heads, 3 * s.d, WIDTH, generator=gen)
    save_file(gates, tmp_path / "g.safetensors")
    found = decoder(source, TEXT, tmp_path / "g.safetensors")
    assert [role.kind for role in found.config.roles] == [
        "window" if spec.window else "select" for spec in windows
    ]
    assert found.stage(f"layers.{full[0]}").module.gate_q.dtype == torch.bfloat16
    assert run(found, tools.prompt(LENGTH)).isfinite().all()


# -- what is refused ---------------------------------------------------------------------------------


def one_line(error, *wanted):
    text = str(error.value)
    assert "\n" not in text
    for part in wanted:
        assert re.search(part, text), (part, text)


def damaged(gates, change):
    found = dict(gates)
    change(found)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: g.pop(name_of(1, "k")),
            r"layers\.1.*linear_k\.weight is missing, which layer 1",
        ),
        (lambda g: g.pop(name_of(1, "q_norm")), r"layers\.1.*qnorm\.weight is missing"),
        (
            lambda g: g.update({name_of(0, "k"): torch.zeros(2, 5, WIDTH)}),
            rf"linear_k\.weight has shape \[2, 5, {WIDTH}\], this model needs \[\d",
        ),
        (
            lambda g: g.update({name_of(0, "q"): g[name_of(0, "q")].to(torch.int8)}),
            "is stored as I8, not as floats",
        ),
        (
            lambda g: g.update({name_of(0, "q"): g[name_of(0, "q")] * torch.inf}),
            "holds what is no finite number",
        ),
        (lambda g: g.clear(), "holds no gates"),
        (
            lambda g: g.update({name_of(2, "q"): g[name_of(0, "q")] + 1}),
            r"layers\.2.*linear_q\.weight belongs to no gate of this model of 2 layers",
        ),
        (
            lambda g: g.update({name_of(0, "q").replace("linear_q", "q_norm"): torch.ones(WIDTH)}),
            r"attngate_q_norm\.weight belongs to no gate",
        ),
        (
            lambda g: g.update({name_of(1, "k").replace("weight", "bias"): torch.ones(WIDTH)}),
            r"attngate_linear_k\.bias belongs to no gate",
        ),
    ],
)
def test_wrong_gates_are_named(llama, gates, tmp_path, change, message):
    path = tmp_path / "wrong.safetensors"
    found = damaged(gates, change)
    save_file(found or {"x": torch.zeros(1)}, path)
    with pytest.raises(InputError) as error:
        decoder(llama[1], TEXT, path)
    one_line(error, message, "wrong.safetensors", "trained for this model")


def test_files_that_cannot_be_read_are_named(llama, tmp_path, gates):
    with pytest.raises(InputError) as error:
        decoder(llama[1], TEXT, tmp_path / "none.safetensors")
    one_line(error, r"none\.safetensors is missing")
    pickled = tmp_path / "attn_gate_weights.pth"
    pickled.write_bytes(b"PK")
    with pytest.raises(InputError) as error:
        decoder(llama[1], TEXT, pickled)
    one_line(error, "pickled tensors", "safetensors.torch.save_file")
    path = tmp_path / "g.safetensors"
    for said in ("{", '{"block": "4"}', '{"block": 0}', "3", "[" * 100_000):
        save_file(gates, path, metadata={"gates": said})
        with pytest.raises(InputError) as error:
            decoder(llama[1], TEXT, path)
        one_line(error, "metadata", r"g\.safetensors")


def test_gates_of_another_training_are_refused(llama, folder, file, tools):
    with pytest.raises(UsageError) as error:
        decoder(llama[1], "seer:block=8", file)
    one_line(error, r"gates\.safetensors were trained with block=4", "use block=4")
    with pytest.raises(UsageError) as error:
        decoder(llama[1], "seer:block=64", file)
    one_line(error, "trained with block=4")
    with pytest.raises(UsageError) as error:
        decoder(folder, "seer:gate=64")
    one_line(error, f"trained with gate={WIDTH}")
    tools.edit_json(folder / "config.json", seerattn_q_head_pooling_type="Qavg")
    with pytest.raises(InputError) as error:
        decoder(folder, TEXT)
    one_line(error, "seerattn_q_head_pooling_type='Qavg'", r"config\.json")


def test_verification_takes_the_same_gates_by_any_name(file, gates, tmp_path):
    class Compiled:
        gates, pre_gates = gate_record(file), None

    renamed, other = tmp_path / "renamed.safetensors", tmp_path / "other.safetensors"
    shutil.copy(file, renamed)
    save_file({n: 2 * g for n, g in gates.items()}, other)
    check_gates(Compiled, renamed)
    with pytest.raises(InputError, match="not the gates that the artifact was compiled with"):
        check_gates(Compiled, other)
    with pytest.raises(InputError, match=r"gates cannot be read: .*none\.safetensors"):
        check_gates(Compiled, tmp_path / "none.safetensors")


def test_gates_go_with_seer(llama, file):
    with pytest.raises(UsageError) as error:
        mc.compile(llama[1], attention="quest", gates=file)
    one_line(error, "--gates .* goes with --attention seer")
    with pytest.raises(UsageError, match="gates are for model folders"):
        mc.compile(torch.nn.Linear(2, 2), example_inputs=(torch.zeros(1, 2),), gates=file)
    with pytest.raises(UsageError, match="keys of single positions"):
        mc.compile(llama[1], attention=TEXT, gates=file, quant="kv4", max_context=CONTEXT)


# -- compiled ----------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_models_choose_by_their_gates(llama, file, tools, tmp_path, capsys):
    """Artifact and eager model agree; what stands in it, and going back and on again."""
    from mimo_compile.cli import main

    source = llama[1]
    artifact = mc.compile(
        source, attention="seer:budget=12", gates=file, db=tmp_path / "r.db", max_context=CONTEXT,
        threads=1,
    )  # fmt: skip
    path = artifact.save(tmp_path / "m.mimo")
    assert artifact.manifest.attention == str(parse_policy(TEXT))
    found = verify_artifact(path, source=source, tokens=64, gates=file, threads=1)
    assert found.ok and found.end_to_end is not None
    checked = {c.workload.partition(":")[0] for c in found.kernels if c.error_ratio is not None}
    assert {"gate_keys", "gate_queries", "score_blocks", "select_blocks"} <= checked
    with pytest.raises(UsageError, match=r"gates of gates\.safetensors, which are needed again"):
        verify_artifact(path, source=source)
    other = tmp_path / "other.safetensors"
    save_file(drawn_gates(llama[0].config, seed=1), other)
    with pytest.raises(InputError, match="not the gates that the artifact was compiled with"):
        verify_artifact(path, gates=other)  # its gates are looked at without a model, too
    with pytest.raises(InputError, match="not the gates that the artifact was compiled with"):
        verify_artifact(path, source=source, gates=other, tokens=8)

    module = mc.load(path)
    prompt = tools.prompt(33)
    eager = decoder(source, "seer:budget=12", file)
    got = list(module.generate_ids(prompt, 24, stop_at_eos=False))
    assert got == eager.generate_greedy(prompt, 24, stop=())
    goes_back(module, prompt)
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gates"]["file"] == file.name and len(told["gates"]["sha256"]) == 64
    config = llama[0].config
    caches = 2 * 4 * CONTEXT * config.num_key_value_heads * config.head_dim
    desc = 4 * 32 * config.num_key_value_heads * WIDTH  # entries stand in lanes of 16
    assert {(x["role"], x["state_bytes"]) for x in told["layers"]} == {("select", caches + desc)}


def goes_back(module, prompt):
    """Compressed keys after going back, and of a prompt in pieces, are those of a fresh sequence."""

    def rows(session, ids, decode=False):
        hidden = [h.copy() for h in session.chunks(ids, decode=decode)]
        return np.concatenate([x.copy() for h in hidden for x in session.logits(h)])

    session = module.session()
    session.append(prompt)
    fresh = rows(session, [5, 6, 7], decode=True)
    session = module.session()
    session.append(prompt[:10])
    session.append([200] * 30)  # completes blocks of other tokens
    session.rewind(10)
    session.append(prompt[10:11])
    session.append(prompt[11:])
    np.testing.assert_allclose(rows(session, [5, 6, 7], decode=True), fresh, rtol=2e-4, atol=2e-4)
    assert session.keep_prefix([*prompt, 9]) == len(prompt)
    np.testing.assert_allclose(rows(session, [5, 6, 7], decode=True), fresh, rtol=2e-4, atol=2e-4)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "quant", "batch"),
    [
        ("seer:threshold=0.08", "none", 2), ("seer:budget=16,sink=1,start=1,block_pos=last", "none", 1),
        ("seer:budget=16", "kv16", 3), ("seer:budget=16", "w8a8kv16", 1),
    ],
)  # fmt: skip
def test_every_form_compiles(folder, tools, tmp_path, text, quant, batch):
    tools.edit_json(folder / "config.json", seerattn_gate_block_size=BLOCK)
    artifact = mc.compile(
        folder, attention=text, quant=quant, db=tmp_path / "r.db", max_context=CONTEXT, batch=batch
    )
    assert artifact.manifest.gates is None
    path = artifact.save(tmp_path / "m.mimo")
    found = verify_artifact(path, source=folder, tokens=64)
    assert found.ok and (found.batch is None) == (batch == 1)
    if quant == "none":
        got = list(mc.load(path).generate_ids(tools.prompt(33), 24, stop_at_eos=False))
        eager = decoder(folder, text, quant=parse_scheme(quant))
        assert got == eager.generate_greedy(tools.prompt(33), 24, stop=())


@pytest.mark.compile
@pytest.mark.slow
def test_tiny_with_gates_as_they_are_distilled(tmp_path, monkeypatch):
    """A file as `tiny.gates` writes it; the plain definition of the built-in model is another oracle."""
    from mimo_compile.frontend.huggingface import resolve_source
    from mimo_compile.tiny.checkpoint import load
    from mimo_compile.tiny.gates import GateShape, new_gates, save_gates
    from mimo_compile.tiny.sparse import Run

    source = resolve_source("tiny")
    model = load(source)
    made = new_gates(model, GateShape(block=16, width=64), 0)
    file = tmp_path / "gates.safetensors"
    save_gates(made, file, "tiny")
    path = mc.compile(
        "tiny", attention="seer:budget=64", gates=file, db=tmp_path / "r.db", max_context=256
    ).save(tmp_path / "m.mimo")
    assert verify_artifact(path, gates=file).ok
    ids = torch.randint(0, 2048, (200,), generator=torch.Generator().manual_seed(0))
    policy = parse_policy("seer:budget=64,block=16,gate=64")
    eager = load_checkpoint(source, NONE, 256, attention=policy, gate_file=file).decoder
    rows = [eager.prefill(ids[:150].tolist())[1]]
    rows += [eager.decode(ids[: at + 1].tolist(), 150) for at in range(150, 200)]
    for gate in made.values():
        for part in gate.parameters():
            part.data = part.data.bfloat16().float()
    want = (Run(model, policy, 150, gates=made).rows(ids) @ model.embed_tokens.T).detach()
    got = torch.cat(rows)[150:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
