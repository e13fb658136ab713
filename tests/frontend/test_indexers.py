"""`--attention dsa`: indexers of a checkpoint or a file, against transformers with plain ones."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from plain_attention import Plain, oracle, run, turn
from safetensors.torch import load_file, save_file

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.policies import parse_policy
from mimo_compile.verify import verify_artifact

HEADS, WIDTH, ROTATED = 3, 20, 16
CONTEXT, LENGTH, NONE = 96, 60, parse_scheme("none")
SIZES = f"heads={HEADS},width={WIDTH}"


def name_of(layer, part):
    return f"model.layers.{layer}.self_attn.indexer.{part}"


def drawn(layers, hidden, seed=0):
    """Return random indexers by tensor name; their scores differ by much more than roundings."""
    gen = torch.Generator().manual_seed(seed)
    out = {}
    for i in layers:
        for part, rows in (("wq", HEADS * WIDTH), ("wk", WIDTH), ("weights_proj", HEADS)):
            made = torch.randn(rows, hidden, generator=gen)
            out[name_of(i, f"{part}.weight")] = 2 * made * hidden**-0.5
        out[name_of(i, "k_norm.weight")] = 1 + 0.2 * torch.randn(WIDTH, generator=gen)
        out[name_of(i, "k_norm.bias")] = 0.2 * torch.randn(WIDTH, generator=gen)
    return out


@pytest.fixture(scope="module")
def llama(tools, tmp_path_factory):
    """A Llama of two layers, and its folder."""
    folder = tmp_path_factory.mktemp("llama")
    model = tools.make_model("llama", num_hidden_layers=2)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def indexers(llama):
    return drawn(range(2), llama[0].config.hidden_size)


@pytest.fixture
def file(indexers, tmp_path):
    path = tmp_path / "indexers.safetensors"
    save_file(indexers, path, metadata={"indexer": json.dumps({"k": 12})})
    return path


@pytest.fixture
def folder(llama, indexers, tmp_path):
    """A checkpoint that brings its indexers, in bfloat16 as theirs."""
    copy = tmp_path / "model"
    shutil.copytree(llama[1], copy)
    stored = load_file(copy / "model.safetensors")
    own = {n: t.bfloat16() if "norm" not in n else t for n, t in indexers.items()}
    save_file({**stored, **own}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def decoder(folder, text, file=None, quant=NONE):
    policy = parse_policy(text)
    return load_checkpoint(folder, quant, CONTEXT, attention=policy, gate_file=file).decoder


class PlainIndexer(Plain):
    """Tokens by an indexer over the inputs of attention, query by query, in float64."""

    def __init__(self, policy, model, tensors):
        config = model.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        super().__init__(policy, config.num_hidden_layers, heads, kv)
        self.w = {n: t.double() for n, t in tensors.items()}
        self.inputs, self.keys = {}, {}
        self.hooks = [
            layer.self_attn.register_forward_pre_hook(self.watch, with_kwargs=True)
            for layer in model.model.layers
        ]

    def watch(self, module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        self.inputs[module.layer_idx] = x[0].double()

    def __call__(self, module, query, key, value, attention_mask, scaling, **more):
        layer, tokens, length = module.layer_idx, query.shape[2], key.shape[2]
        before = self.keys[layer] if length > tokens else []
        places = range(length - tokens, length)
        new = [self.key(layer, x, p) for x, p in zip(self.inputs[layer], places, strict=True)]
        self.keys[layer] = [*before, *new]
        self.first = length - tokens
        return super().__call__(module, query, key, value, attention_mask, scaling, **more)

    def seen(self, layer, q, k, p, decoding):
        x = self.inputs[layer][p - self.first]
        weights = self.w[name_of(layer, "weights_proj.weight")] @ x * (HEADS * WIDTH) ** -0.5
        rows = (self.w[name_of(layer, "wq.weight")] @ x).reshape(HEADS, WIDTH)
        rows = torch.stack([self.turned(row, p) for row in rows])
        scores = [float(weights @ torch.relu(rows @ key)) for key in self.keys[layer][:p]]
        best = sorted(range(p), key=lambda j: -scores[j])[: self.p.k - 1]
        return [sorted({p, *best})] * self.heads

    def key(self, layer, x, p):
        row = self.w[name_of(layer, "wk.weight")] @ x
        row = row - row.mean()
        row = row / (row.square().mean() + 1e-6).sqrt()
        norm = (self.w[name_of(layer, f"k_norm.{part}")] for part in ("weight", "bias"))
        return self.turned(row * next(norm) + next(norm), p)

    def turned(self, row, p):
        return torch.cat([turn(row[None, :ROTATED], [p])[0], row[ROTATED:]])


def plainly(model, policy, ids, tensors):
    plain = PlainIndexer(policy, model, tensors)
    try:
        return oracle(model, policy, ids, plain)
    finally:
        for hook in plain.hooks:
            hook.remove()


def test_eager_decoders_choose_by_their_indexers(llama, indexers, file, tools):
    """The file says how many tokens; a list of another length is another function."""
    model, source = llama
    ids, policy = tools.prompt(LENGTH), parse_policy(f"dsa:k=12,{SIZES}")
    found = decoder(source, "dsa", file)
    assert found.config.attention == policy and not found.config.decodes_apart
    got = run(found, ids)
    torch.testing.assert_close(got, plainly(model, policy, ids, indexers), rtol=2e-3, atol=2e-3)
    other = run(decoder(source, "dsa:k=7", file), ids)
    assert not torch.allclose(got, other, rtol=1e-2, atol=1e-2)


def test_what_is_asked_for_counts_though_it_is_the_default(llama, file):
    policy = decoder(llama[1], "dsa:k=2048", file).config.attention
    assert policy.k == 2048 and str(policy) == f"dsa:k=2048,{SIZES}"
    for text in ("heads=64", "width=128"):
        with pytest.raises(UsageError, match="leave out"):
            decoder(llama[1], f"dsa:{text}", file)


def test_enough_tokens_are_full_attention(llama, file, tools):
    ids = tools.prompt(LENGTH)
    got, want = (run(decoder(llama[1], t, f), ids) for t, f in (("dsa:k=96", file), ("full", None)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_may_bring_its_indexers(llama, folder, indexers, tools, tmp_path):
    """They do not disturb other policies, and are what a file of them is."""
    ids, rounded = tools.prompt(LENGTH), tmp_path / "r.safetensors"
    save_file({n: t if "norm" in n else t.bfloat16() for n, t in indexers.items()}, rounded)
    tools.edit_json(folder / "config.json", index_topk=9, index_n_heads=HEADS, index_head_dim=WIDTH)
    own, other = decoder(folder, "dsa"), decoder(llama[1], "dsa:k=9", rounded)
    assert own.config.attention == other.config.attention == parse_policy(f"dsa:k=9,{SIZES}")
    assert own.stage("layers.1").module.index_w.dtype == torch.bfloat16
    torch.testing.assert_close(run(own, ids), run(other, ids), rtol=1e-4, atol=1e-4)
    got, want = (run(decoder(source, "model"), ids) for source in (folder, llama[1]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_prompts_in_pieces_make_the_same_keys(llama, file, tools):
    ids = torch.tensor(tools.prompt(LENGTH), dtype=torch.int32)
    model = decoder(llama[1], "dsa:k=96", file)
    model.prefill(ids.tolist())
    state = model.stage("layers.1").module.get_buffer("index_k")
    at_once = state.clone()
    assert at_once[:LENGTH].any(-1).all() and not at_once[LENGTH:].any()
    model.reset()
    for begin, end in ((0, 7), (7, 8), (8, 31), (31, LENGTH)):
        model.forward_step(ids[begin:end], begin)
    torch.testing.assert_close(state, at_once, rtol=1e-4, atol=1e-4)


def test_prompts_in_pieces_see_the_same_tokens(llama, file, tools):
    ids = torch.tensor(tools.prompt(LENGTH), dtype=torch.int32)
    model, every = decoder(llama[1], "dsa:k=12", file), decoder(llama[1], "dsa:k=96", file)
    hidden, logits = model.forward_step(ids, 0)
    # lists leave something out, and what they leave out matters
    assert (hidden - every.forward_step(ids, 0)[0]).abs()[12:].amax(-1).min() > 1e-2
    for pieces in ((0, 13, 14, 37, LENGTH), (0, 45, *range(46, LENGTH + 1))):
        model.reset()
        parts = [model.forward_step(ids[begin:end], begin) for begin, end in pairwise(pieces)]
        for got, want in zip(zip(*parts, strict=True), (hidden, logits), strict=True):
            torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4)


def test_later_tokens_change_nothing(llama, file, tools):
    ids = torch.tensor(tools.prompt(LENGTH), dtype=torch.int32)
    model = decoder(llama[1], "dsa:k=12", file)
    want = model.forward_step(ids, 0)[1][:40]
    model.reset()
    other = torch.cat([ids[:40], ids[:20]])
    torch.testing.assert_close(model.forward_step(other, 0)[1][:40], want, rtol=1e-5, atol=1e-5)


def test_hybrid_models_need_indexers_of_full_layers_only(saved, tmp_path, tools):
    source = saved("mimo_v2_flash")[1]
    config = decoder(source, "full").config
    full = [i for i, spec in enumerate(config.layers) if not spec.window]
    save_file(drawn(full, config.hidden), tmp_path / "i.safetensors")
    found = decoder(source, "dsa:k=11", tmp_path / "i.safetensors")
    assert [role.kind for role in found.config.roles] == [
        "window" if spec.window else "select" for spec in config.layers
    ]
    assert run(found, tools.prompt(LENGTH)).isfinite().all()


# -- what is refused ---------------------------------------------------------------------------------


def one_line(error, *wanted):
    text = str(error.value)
    assert "\n" not in text
    for part in wanted:
        assert re.search(part, text), (part, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(name_of(1, "wk.weight")),
            r"layers\.1.*wk\.weight is missing, which layer 1",
        ),
        (lambda t: t.pop(name_of(0, "k_norm.bias")), r"layers\.0.*k_norm\.bias is missing"),
        (
            lambda t: t.update({name_of(1, "wq.weight"): torch.zeros(5, 64)}),
            rf"wq\.weight has shape \[5, 64\], this model needs \[{HEADS * WIDTH}, 64\]",
        ),
        (
            lambda t: t.update({name_of(0, "wk.weight"): torch.zeros(WIDTH, 64).to(torch.int8)}),
            "is stored as I8, not as floats",
        ),
        (
            lambda t: t.update({name_of(0, "k_norm.bias"): torch.full((WIDTH,), torch.nan)}),
            "holds what is no finite number",
        ),
        (
            lambda t: t.update({name_of(2, "wk.weight"): t[name_of(0, "wk.weight")] + 1}),
            r"layers\.2.*wk\.weight belongs to no indexer of this model of 2 layers",
        ),
        (
            lambda t: t.update({name_of(0, "wq_b.weight"): torch.zeros(8, 8)}),
            r"wq_b\.weight reads the latent queries of multi-head latent attention.*reads the layer's",
        ),
        (lambda t: t.clear(), r"there are no indexers: no matrix .*wq\.weight"),
        (
            lambda t: [t.pop(name_of(i, "weights_proj.weight")) for i in range(2)],
            r"no indexers: no matrix .*weights_proj\.weight",
        ),
    ],
)
def test_wrong_indexers_are_named(llama, indexers, tmp_path, change, message):
    path, found = tmp_path / "wrong.safetensors", dict(indexers)
    change(found)
    save_file(found or {"x": torch.zeros(1)}, path)
    with pytest.raises(InputError) as error:
        decoder(llama[1], "dsa", path)
    one_line(error, message, r"wrong\.safetensors")


def test_indexers_that_do_not_fit(llama, indexers, file, tmp_path):
    with pytest.raises(UsageError) as error:
        decoder(llama[1], "dsa:width=64", file)
    one_line(error, rf"the indexers of .*indexers\.safetensors have width={WIDTH}", "leave out")
    narrow = {n: t[:2] if "norm" in n else t for n, t in indexers.items()}
    for n, t in indexers.items():
        rows = {"wq.weight": HEADS * 2, "wk.weight": 2}
        narrow[n] = next((t[:r] for part, r in rows.items() if n.endswith(part)), narrow[n])
    save_file({n: t.contiguous() for n, t in narrow.items()}, tmp_path / "n.safetensors")
    with pytest.raises(InputError) as error:
        decoder(llama[1], "dsa", tmp_path / "n.safetensors")
    one_line(error, "width 2 cannot rotate as many channels as the layer does, 16, in layer 0")
    save_file(indexers, tmp_path / "m.safetensors", metadata={"indexer": '{"k": 0}'})
    with pytest.raises(InputError, match="k of its metadata must be a number of tokens"):
        decoder(llama[1], "dsa", tmp_path / "m.safetensors")
    save_file(indexers, tmp_path / "m.safetensors", metadata={"indexer": '{"k": 1099511627776}'})
    with pytest.raises(InputError, match=r"number of tokens up to .*m\.safetensors"):
        decoder(llama[1], "dsa", tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="keys of single positions"):
        mc.compile(llama[1], attention="dsa", gates=file, quant="kv4", max_context=CONTEXT)
    with pytest.raises(UsageError, match=r"--gates .* goes with --attention seer.* and dsa"):
        mc.compile(llama[1], attention="full", gates=file)


# -- compiled ----------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_models_choose_by_their_indexers(llama, file, tools, tmp_path, capsys):
    """Artifact and eager model agree; what stands in it, and going back and on again."""
    from mimo_compile.cli import main

    source = llama[1]
    artifact = mc.compile(
        source, attention="dsa", gates=file, db=tmp_path / "r.db", max_context=CONTEXT, threads=1
    )
    path = artifact.save(tmp_path / "m.mimo")
    assert artifact.manifest.attention == f"dsa:k=12,{SIZES}"
    assert not any(name.startswith("decode_") for name in artifact.manifest.entries)
    found = verify_artifact(path, source=source, tokens=64, gates=file, threads=1)
    assert found.ok and found.end_to_end is not None
    checked = {c.workload.partition(":")[0] for c in found.kernels if c.error_ratio is not None}
    assert {"append_entries", "score_blocks", "select_blocks", "sparse_attention"} <= checked
    module, prompt = mc.load(path), tools.prompt(33)
    got = list(module.generate_ids(prompt, 24, stop_at_eos=False))
    assert got == decoder(source, "dsa", file).generate_greedy(prompt, 24, stop=())
    goes_back(module, prompt)
    assert main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gates"]["file"] == file.name
    config = llama[0].config
    caches = 2 * 4 * CONTEXT * config.num_key_value_heads * config.head_dim
    keys = 4 * CONTEXT * WIDTH
    assert {(x["role"], x["state_bytes"]) for x in told["layers"]} == {("select", caches + keys)}


def goes_back(module, prompt):
    """Keys after going back, and of a prompt in pieces, are those of a fresh sequence."""

    def rows(session, ids):
        hidden = [h.copy() for h in session.chunks(ids)]
        return np.concatenate([x.copy() for h in hidden for x in session.logits(h)])

    session = module.session()
    session.append(prompt)
    fresh = rows(session, [5, 6, 7])
    session = module.session()
    session.append(prompt[:10])
    session.append([200] * 30)
    session.rewind(10)
    session.append(prompt[10:11])
    session.append(prompt[11:])
    np.testing.assert_allclose(rows(session, [5, 6, 7]), fresh, rtol=2e-4, atol=2e-4)
    assert session.keep_prefix([*prompt, 9]) == len(prompt)
    np.testing.assert_allclose(rows(session, [5, 6, 7]), fresh, rtol=2e-4, atol=2e-4)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(("quant", "batch"), [("none", 2), ("w8a8kv16", 3)])
def test_every_form_compiles(folder, tools, tmp_path, quant, batch):
    artifact = mc.compile(
        folder, attention="dsa:k=16", quant=quant, db=tmp_path / "r.db", max_context=CONTEXT,
        batch=batch,
    )  # fmt: skip
    assert artifact.manifest.gates is None
    path = artifact.save(tmp_path / "m.mimo")
    found = verify_artifact(path, source=folder, tokens=64)
    assert found.ok and found.batch is not None
    if quant == "none":
        prompts = [tools.prompt(n, seed=n) for n in (33, 9, 20)]
        eager = decoder(folder, "dsa:k=16")
        alone = [eager.generate_greedy(p, 20, stop=()) for p in prompts]
        got = [[] for _ in prompts]
        for index, token in mc.load(path).generate_batch_ids(prompts, 20, stop_at_eos=False):
            got[index].append(token)
        assert got == alone


@pytest.mark.compile
@pytest.mark.slow
def test_tiny_with_indexers_as_they_are_distilled(tmp_path):
    """A file as `tiny.indexers` writes it; the plain definition of the built-in model is another oracle."""
    from mimo_compile.frontend.huggingface import resolve_source
    from mimo_compile.tiny.checkpoint import load
    from mimo_compile.tiny.indexers import IndexerShape, load_indexers, new_indexers, save_indexers
    from mimo_compile.tiny.sparse import Run

    source = resolve_source("tiny")
    model = load(source)
    file = tmp_path / "indexers.safetensors"
    save_indexers(new_indexers(model, IndexerShape(4, 64), 0), file, "tiny")
    path = mc.compile(
        "tiny", attention="dsa:k=48", gates=file, db=tmp_path / "r.db", max_context=256
    ).save(tmp_path / "m.mimo")
    assert verify_artifact(path, gates=file).ok
    ids = torch.randint(0, 2048, (200,), generator=torch.Generator().manual_seed(0))
    policy = parse_policy("dsa:k=48,heads=4,width=64")
    eager = load_checkpoint(source, NONE, 256, attention=policy, gate_file=file).decoder
    rows = [eager.prefill(ids[:150].tolist())[1]]
    rows += [eager.decode(ids[: at + 1].tolist(), 150) for at in range(150, 200)]
    made = Run(model, policy, 150, indexers=load_indexers(model.config, file))
    want = (made.rows(ids) @ model.embed_tokens.T).detach()
    got = torch.cat(rows)[150:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
