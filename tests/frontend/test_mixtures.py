"""Families with routed experts: what transformers has no class for, names of its modules, refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from mimo_compile.errors import CheckpointWarning, InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models import FAMILIES, get_family
from mimo_compile.frontend.models.family import Fields
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
EXPERTS, SHARED, WIDTH = 8, 2, 32


@pytest.fixture(scope="module")
def deepseek(tools, tmp_path_factory):
    """A DeepSeekMoE folder; and a Llama whose later blocks are DeepSeek-V2's: the same softmax experts."""
    folder = tmp_path_factory.mktemp("deepseek")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 257}
    config = LlamaConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    block = DeepseekV2Config(
        **shape, n_routed_experts=EXPERTS, n_shared_experts=SHARED, num_experts_per_tok=3,
        moe_intermediate_size=WIDTH, topk_method="greedy", num_attention_heads=4,
    )  # fmt: skip
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(block)
    tools.randomise(model)
    tensors = {}
    for name, value in model.state_dict().items():
        for e in range(EXPERTS):
            if name.endswith("experts.gate_up_proj"):
                stem = name.removesuffix("gate_up_proj")
                gate, up = value[e].chunk(2)
                tensors[f"{stem}{e}.gate_proj.weight"] = gate.clone()
                tensors[f"{stem}{e}.up_proj.weight"] = up.clone()
            elif name.endswith("experts.down_proj"):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = value[e].clone()
            else:
                tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    fields = {
        "model_type": "deepseek", "n_routed_experts": EXPERTS, "n_shared_experts": SHARED,
        "num_experts_per_tok": 3, "moe_intermediate_size": WIDTH, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **fields}))
    return model.eval(), folder


def relative(found, expected):
    assert expected.std() > 0.1, "the reference must not be trivial"
    return float((found - expected).abs().max() / expected.abs().max())


def test_deepseek_equals_the_blocks_of_its_successor(deepseek, tools):
    model, folder = deepseek
    decoder = load_checkpoint(folder, NONE).decoder
    assert [spec.mlp for spec in decoder.config.layers] == ["dense", "moe", "moe"]
    ids = tools.prompt(60)
    assert relative(decoder.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4
    assert decoder.generate_greedy(ids[:21], 32) == tools.greedy(model, ids[:21], 32)


def test_a_single_expert_is_never_divided_by_itself(deepseek, tools, tmp_path):
    shutil.copytree(deepseek[1], tmp_path, dirs_exist_ok=True)
    for k, normed in ((1, False), (2, True)):
        tools.edit_json(tmp_path / "config.json", num_experts_per_tok=k, norm_topk_prob=True)
        config = load_checkpoint(tmp_path, NONE).decoder.config
        assert [spec.norm_topk for spec in config.layers[1:]] == [normed] * 2


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_names_of_transformers_own_modules_are_read(case, saved, tools, tmp_path):
    model, folder = saved(case)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    own = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in own)
    assert not set(own) & {n for n in load_file(folder / "model.safetensors") if "experts" in n}
    save_file(own, tmp_path / "model.safetensors")
    ids = tools.prompt(30)
    one, other = (load_checkpoint(f, NONE).decoder.prefill(ids)[1] for f in (folder, tmp_path))
    assert relative(one, other) < 1e-5  # sums depend on how matrices are aligned


def test_layers_with_experts(saved, tools, tmp_path):
    def kinds(case, **changes):
        folder = shutil.copytree(saved(case)[1], tmp_path / "m", dirs_exist_ok=True)
        tools.edit_json(folder / "config.json", **changes)
        checkpoint = open_checkpoint(folder)
        fields = Fields(checkpoint.config, checkpoint.config_file)
        layers = (
            get_family(fields.get("model_type"), fields.file).configure(fields, checkpoint).layers
        )
        return "".join(spec.mlp[0] for spec in layers)

    assert kinds("qwen3_moe") == "mdm"
    assert kinds("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2) == "dddmdm"
    assert kinds("qwen3_moe", mlp_only_layers=[0, 1, 2]) == "ddd"
    assert kinds("qwen2_moe", mlp_only_layers=[]) == "mmm"
    assert kinds("dots1", layer_types=None, first_k_dense_replace=2) == "ddm"
    assert (
        kinds(
            "dots1",
            layer_types=None,
            num_hidden_layers=6,
            first_k_dense_replace=1,
            moe_layer_freq=2,
        )
        == "ddmdmd"
    )


def test_draft_layers_of_glm_are_left_out(saved, tools, tmp_path):
    folder = shutil.copytree(saved("glm4_moe")[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.enorm.weight"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors")
    tools.edit_json(folder / "config.json", num_nextn_predict_layers=1)
    assert load_checkpoint(folder, NONE).report.unused == ("model.layers.3.enorm.weight",)
    tools.edit_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(InputError, match=r"does not have: model\.layers\.3\.enorm\.weight"):
        load_checkpoint(folder, NONE)


MANY = {"num_experts": 9_000, "num_local_experts": None}
FULL, SLIDING = "full_attention", "sliding_attention"
WRONG = [
    ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
    ("mixtral", {"num_experts": 5}, "number of experts is not given once.*5"),
    ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts cannot be chosen"),
    ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
    ("mixtral", {"topk_method": "group_limited_greedy"}, "group_limited_greedy.*not supported"),
    ("mixtral", {"n_shared_experts": 1}, "n_shared_experts=1 is not supported"),
    ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not supported"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts"),
    ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers must list numbers of the 3 layers"),
    ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must list"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must list"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not"),
    (
        "qwen3_moe",
        {**MANY, "num_hidden_layers": 9_000, "mlp_only_layers": []},
        "config.json describes more than",
    ),
    ("mixtral", {"sliding_window": 8, "layer_types": [FULL] * 3}, "does not fit sliding_window=8"),
    ("mixtral", {"sliding_window": 8, "use_sliding_window": False}, "though use_sliding_window is"),
    (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL] * 3},
        "though use_sliding_window is true",
    ),
    ("olmoe", {"layer_types": [SLIDING] * 3}, "which no olmoe model has"),
    ("glm4_moe", {"use_sliding_window": True, "sliding_window": 8}, "=True is not supported"),
    ("dots1", {"layer_types": None, "sliding_window": 8, "max_window_layers": None}, "is missing"),
    (
        "qwen2_moe",
        {"use_sliding_window": False, "sliding_window": 8, "layer_types": [SLIDING] * 3},
        "though use_sliding_window is false",
    ),
    (
        "qwen2_moe",
        {"layer_types": None, "use_sliding_window": True},
        "which layers have the window",
    ),
    ("qwen2_moe", {"shared_expert_intermediate_size": None}, "intermediate_size is missing"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 48}, "config.json says"),
    ("olmoe", {"clip_qkv": -1.0}, "clip_qkv must be a positive number"),
    ("olmoe", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("dots1", {"n_group": 3}, "cannot be chosen from 1 of 3 groups"),
    ("dots1", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
    ("dots1", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
    ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer"),
]


@pytest.mark.parametrize(("case", "change", "match"), WRONG)
def test_what_is_wrong_or_not_supported_is_named(case, change, match, saved, tools, tmp_path):
    folder = shutil.copytree(saved(case)[1], tmp_path, dirs_exist_ok=True)
    tools.edit_json(folder / "config.json", **change)
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(folder, NONE)
    assert "\n" not in str(caught.value) and caught.value.where


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert.up_proj.weight"),
        ("dots1", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("dots1", "model.layers.1.mlp.shared_experts.down_proj.weight"),
        ("olmoe", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(case, name, saved, tmp_path):
    folder = shutil.copytree(saved(case)[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=name.replace(".", r"\.") + " is missing"):
        load_checkpoint(folder, NONE)


def test_fields_that_no_family_knows_are_named(saved, tools, tmp_path):
    folder = shutil.copytree(saved("mixtral")[1], tmp_path, dirs_exist_ok=True)
    tools.edit_json(folder / "config.json", logit_scale=0.5, sinks=[], attention_dropout=0.1)
    with pytest.warns(CheckpointWarning, match="has logit_scale, which no mixtral") as caught:
        load_checkpoint(folder, NONE)
    assert len(caught) == 1


def test_false_and_zero_say_something_and_so_do_settings_of_angles(saved):
    checkpoint = open_checkpoint(saved("llama")[1])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4], "mscale": 0}
    more = {
        "is_causal": False,
        "norm_after": 0,
        "sinks": {},
        "max_length": 20,
        "unsloth_fixed": True,
    }
    fields = Fields({**checkpoint.config, **more, "rope_parameters": rope}, checkpoint.config_file)
    get_family("llama", fields.file).configure(fields, checkpoint)
    unknown = ["is_causal", "norm_after", "rope_parameters.mrope_section", "rope_parameters.mscale"]
    assert fields.unknown() == unknown


def test_windows_need_the_layer_where_they_begin(saved):
    checkpoint = open_checkpoint(saved("qwen2")[1])
    raw = {**checkpoint.config, "use_sliding_window": True, "sliding_window": 8}
    for change, match in (
        ({"layer_types": None, "max_window_layers": None}, "max_window_layers is missing"),
        (
            {"layer_types": [SLIDING] * 3, "use_sliding_window": False},
            "use_sliding_window is false",
        ),
    ):
        fields = Fields({**raw, **change}, checkpoint.config_file)
        with pytest.raises(InputError, match=match):
            get_family("qwen2", fields.file).configure(fields, checkpoint)


def test_every_family_is_listed():
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    table = text.partition("## Families")[2].partition("## Quantised")[0]
    assert sorted(["model_type", *FAMILIES]) == sorted(
        re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    )
