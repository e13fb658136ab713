"""LoRA adapters in PEFT's format: several over one frozen model, beside eager and merged weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.adapters import attach_adapters, load_adapter
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
CONTEXT = 48
"""Steps of up to 16 tokens; the slow test has those of 64."""
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
EVERY = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def write_adapter(folder, model, r, targets, *, layers=None, seed=0, dtype=torch.float32, **config):
    """Write an adapter folder as PEFT does, and return the changes of weights that it means."""
    generator = torch.Generator().manual_seed(seed)
    alpha = config.pop("lora_alpha", 2 * r)
    tensors, deltas = {}, {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if not module.endswith(tuple(targets)):
            continue
        if layers is not None and int(module.split(".")[2]) not in layers:
            continue
        own = config.get("rank_pattern", {}).get(module.rpartition(".")[2], r)
        n, k = weight.shape
        a = (torch.randn(own, k, generator=generator) * k**-0.5).to(dtype)
        b = (torch.randn(n, own, generator=generator) * 0.5).to(dtype)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        gain = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
        deltas[name] = gain * (b.double() @ a.double())
    settings = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none",
        "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "init_lora_weights": True, "lora_dropout": 0.05, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/where", "inference_mode": True, **config,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


@pytest.fixture(scope="session")
def case(saved, tmp_path_factory):
    """A small Llama, its folder, and two adapters with the changes that they mean."""
    model, folder = saved("llama")
    root = tmp_path_factory.mktemp("adapters")
    deltas = {
        "law": write_adapter(root / "law", model, 3, ATTENTION, seed=1),
        "med": write_adapter(
            root / "med", model, 4, EVERY, seed=2, layers=(0, 2), use_rslora=True,
            rank_pattern={"o_proj": 1}, dtype=torch.bfloat16,
        ),
    }  # fmt: skip
    return model, folder, {name: root / name for name in deltas}, deltas


def eager(folder, quant, folders, storage="exact"):
    loaded = load_checkpoint(folder, parse_scheme(quant), 96)
    attach_adapters(loaded, folders, storage)
    return loaded.decoder


def merged_logits(tools, model, deltas, ids):
    """Logits of the transformers model with an adapter merged into its weights."""
    with torch.no_grad():
        kept = {n: p.clone() for n, p in model.named_parameters() if n in deltas}
        try:
            for name, parameter in model.named_parameters():
                if name in deltas:
                    parameter += deltas[name].to(parameter.dtype)
            return tools.logits_of(model, ids).numpy()
        finally:
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


@pytest.fixture(scope="session")
def compiled(case, tmp_path_factory):
    """Return a function: quantisation -> an artifact with both adapters."""
    made = {}

    def get(quant):
        if quant not in made:
            folder = tmp_path_factory.mktemp(f"lora-{quant}")
            artifact = mc.compile(
                case[1],
                quant=quant,
                adapters=case[2],
                db=folder / "records.db",
                max_context=CONTEXT,
            )
            made[quant] = artifact.save(folder / "model.mimo")
        return made[quant]

    return get


@pytest.mark.slow
def test_float_artifact_equals_merged_weights(case, compiled, tools):
    model, _, _, deltas = case
    module = mc.load(compiled("none"))
    assert module.manifest.decoder.adapters == ("law", "med")
    found = {}
    for name, delta in ((None, {}), *deltas.items()):
        want = merged_logits(tools, model, delta, PROMPT)
        session = module.session(name)
        rows = [x.copy() for h in session.chunks(PROMPT) for x in session.logits(h.copy())]
        got = found[name] = np.concatenate(rows)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert np.abs(found["law"] - found[None]).max() > 0.05 * np.abs(found[None]).max()
    assert np.abs(found["med"] - found["law"]).max() > 0.05 * np.abs(found[None]).max()


@pytest.mark.parametrize("quant", ["w4g32a8", pytest.param("w2g32", marks=pytest.mark.slow)])
def test_tokens_equal_eager_for_each_adapter_and_for_none(case, compiled, quant):
    decoder = eager(case[1], quant, case[2])
    module = mc.load(compiled(quant))
    texts = {}
    for name in (None, "law", "med", None, "law"):  # no reload in between
        decoder.adapter = -1 if name is None else decoder.adapters.index(name)
        want = decoder.generate_greedy(PROMPT, 24, stop=())
        got = list(module.generate_ids(PROMPT, 24, adapter=name, stop_at_eos=False))
        assert got == want
        assert texts.setdefault(name, got) == got
    assert len({tuple(t) for t in texts.values()}) == 3


def test_without_an_adapter_the_model_is_the_plain_one_to_the_bit(case, compiled, tmp_path):
    plain = mc.compile(case[1], quant="w4g32a8", db=tmp_path / "records.db", max_context=CONTEXT)
    base = mc.load(plain.save(tmp_path / "plain.mimo"))
    module = mc.load(compiled("w4g32a8"))
    wanted = base.token_logprobs(PROMPT)
    first = module.token_logprobs(PROMPT, adapter="law")
    assert np.array_equal(module.token_logprobs(PROMPT), wanted)
    assert not np.array_equal(first, wanted)
    module.token_logprobs(PROMPT, adapter="med")
    assert np.array_equal(module.token_logprobs(PROMPT, adapter="law"), first)
    assert not base.manifest.decoder.adapters


@pytest.mark.slow
def test_texts_of_a_batch_have_adapters_of_their_own(case, tmp_path):
    module = mc.compile(
        case[1], quant="w4g32a8", adapters=case[2], db=tmp_path / "r.db", max_context=96, batch=3
    ).module()
    names = ["med", None, "law", "med"]
    alone = [list(module.generate_ids(PROMPT, 16, adapter=n, stop_at_eos=False)) for n in names]
    got = [[] for _ in names]
    pairs = module.generate_batch_ids([PROMPT] * 4, 16, adapter=names, stop_at_eos=False)
    for index, token in pairs:
        got[index].append(token)
    assert got == alone and got[0] == got[3] and got[0] != got[1] != got[2]


def test_layers_that_no_adapter_touches_keep_plain_kernels(case, tmp_path):
    model, folder, _, _ = case
    write_adapter(tmp_path / "one", model, 2, ("down_proj",), layers=(1,))
    artifact = mc.compile(
        folder,
        quant="w8a8",
        adapters={"one": tmp_path / "one"},
        db=tmp_path / "r.db",
        max_context=16,
    )
    entry = artifact.programs.entries["step_1"]
    fused = [c.label for c in entry.calls if c.kernel.startswith("lora_mpgemm")]
    assert len(fused) == 1 and "layers.1" in fused[0]


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_rounded_adapters_stay_close(case, storage, tmp_path):
    # what is bf16 already would not be rounded
    write_adapter(tmp_path / "two", case[0], 4, ATTENTION, seed=3)
    folders = {"law": case[2]["law"], "two": tmp_path / "two"}
    exact = eager(case[1], "none", folders)
    rounded = eager(case[1], "none", folders, storage)
    kinds = {b.dtype for s in rounded.stages() for n, b in s.module.named_buffers() if "lora" in n}
    assert kinds == {torch.bfloat16 if storage == "bf16" else torch.uint8}
    for index in (0, 1):
        exact.adapter = rounded.adapter = index
        want, got = (d.prefill(PROMPT)[1] for d in (exact, rounded))
        error = float((got - want).norm() / want.norm())
        assert 0 < error < (0.02 if storage == "bf16" else 0.2)


@pytest.mark.slow
def test_fp8_artifact_equals_its_eager_decoder(case, tmp_path):
    artifact = mc.compile(
        case[1], quant="w4g32a8", adapters=case[2], adapter_format="fp8", db=tmp_path / "r.db",
        max_context=96,
    )  # fmt: skip
    module = mc.load(artifact.save(tmp_path / "m.mimo"))
    decoder = eager(case[1], "w4g32a8", case[2], "fp8")
    decoder.adapter = 1
    want = decoder.generate_greedy(PROMPT, 16, stop=())
    assert list(module.generate_ids(PROMPT, 16, adapter="med", stop_at_eos=False)) == want


def test_alpha_and_rank_patterns(case, tmp_path):
    model = case[0]
    write_adapter(
        tmp_path,
        model,
        4,
        EVERY,
        lora_alpha=6,
        alpha_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
    )
    modules = load_adapter("a", tmp_path).modules
    assert modules["model.layers.0.self_attn.q_proj"].gain == 0.5
    assert modules["model.layers.1.mlp.up_proj"].gain == 0.75
    assert modules["model.layers.0.mlp.up_proj"].gain == 1.5


def broken(folder, change, tensors=None):
    """Change a folder's settings, or its tensors."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "lora_only"}, "bias="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, "other base weights"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"r": 0}, "rank 0"),
        ({"r": "4"}, "rank '4'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 1}}, "no pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_settings_that_are_refused(case, tmp_path, change, message):
    write_adapter(tmp_path, case[0], 4, ATTENTION)
    broken(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter("a", tmp_path)
    assert "adapter_" in str(caught.value)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no matrices"),
        ({f"{Q0}.lora_A.weight": (4, 64)}, "not the other matrix"),
        ({f"{Q0}.lora_A.weight": (4, 64), f"{Q0}.lora_B.weight": (64, 3)}, "do not belong"),
        ({f"{Q0}.lora_magnitude_vector": (64,)}, "no matrix of a plain LoRA"),
        (
            {f"{Q0}.lora_A.weight": (4, 63), f"{Q0}.lora_B.weight": (64, 4)},
            r"\[64, 64\] in the model",
        ),
        (
            {
                "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (4, 64),
                "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": (64, 4),
            },
            "layers.9.self_attn.q_proj, which the model does not have",
        ),
        (
            {
                "base_model.model.lm_head.lora_A.weight": (4, 64),
                "base_model.model.lm_head.lora_B.weight": (257, 4),
            },
            "lm_head, which cannot have one",
        ),
    ],
)
def test_matrices_that_are_refused(case, tmp_path, tensors, message):
    write_adapter(tmp_path, case[0], 4, ATTENTION)
    broken(tmp_path, {}, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(InputError, match=message):
        eager(case[1], "none", {"a": tmp_path})


def test_files_that_are_refused(case, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_adapter("a", tmp_path / "none")
    write_adapter(tmp_path, case[0], 4, ATTENTION)
    weights = tmp_path / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter("a", tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_adapter("a", tmp_path)
    bad = {
        f"{Q0}.lora_A.weight": torch.full((4, 64), math.nan),
        f"{Q0}.lora_B.weight": torch.zeros(64, 4),
    }
    save_file(bad, weights)
    with pytest.raises(InputError, match="no finite number"):
        load_adapter("a", tmp_path)
    with pytest.raises(UsageError, match="name"):
        load_adapter("../a", tmp_path)
    with pytest.raises(UsageError, match="int4"):
        eager(case[1], "none", {"a": tmp_path}, "int4")


def test_choices_that_are_refused(case, compiled):
    module = mc.load(compiled("w4g32a8"))
    before = list(module.generate_ids(PROMPT, 4))
    with pytest.raises(UsageError, match=r"no adapter 'tax'.*law, med"):
        module.generate_ids(PROMPT, 4, adapter="tax")
    with pytest.raises(UsageError, match="no adapter 'tax'"):
        module.session("tax")
    assert list(module.generate_ids(PROMPT, 4)) == before
    with pytest.raises(UsageError, match="model folders"):
        mc.compile(torch.nn.Linear(2, 2), example_inputs=(torch.zeros(1, 2),), adapters=case[2])
    with pytest.raises(UsageError, match="AWQ"):
        mc.compile(case[1], quant="w4g32a8", calibrate="awq", adapters=case[2])


def test_command_line(case, tmp_path, capsys):
    out = tmp_path / "m.mimo"
    options = [f"--adapter={name}={folder}" for name, folder in case[2].items()]
    common = ["--db", str(tmp_path / "r.db"), "--max-context", "32", "--json"]
    assert (
        main(["compile", str(case[1]), "--quant", "w4g32a8", "-o", str(out), *options, *common])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["adapters"] == ["law", "med"]
    assert main(["inspect", str(out)]) == 0
    assert "adapters  law, med" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == ["law", "med"]
    for wrong in (["--adapter", "law"], ["--adapter", "a=x", "--adapter", "a=y"]):
        assert main(["compile", str(case[1]), "-o", str(out), *wrong]) == 2
