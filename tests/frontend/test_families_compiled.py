"""Every family, compiled: the artifact on disk against transformers, logits and greedy tokens."""

import numpy as np
import pytest

import mimo_compile as mc

pytestmark = pytest.mark.compile
FAST = ("llama-linear-mha",)
SLOW = (
    "llama", "llama-tied-llama3", "qwen2", "qwen2-window", "qwen3", "mimo_v2_flash", "mimo_v2_flash-groups",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe-clipped", "glm4_moe",
)  # fmt: skip
SHARDED = ("llama-tied-llama3", "qwen2-window", "qwen3", "mimo_v2_flash")
CONTEXT = 96
"""Steps of 1, 4, 16 and 64 tokens."""
LENGTHS = (1, 4, 5, 7, 8, 9, 16, 17, 33, 63, 64, 65, 90)
"""On both sides of each step's token count and of the sliding window of 8."""


@pytest.fixture(scope="session")
def compiled(saved, tmp_path_factory):
    """Return a function: case -> its artifact, compiled once."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(f"{case}-compiled")
            made[case] = compile_to(folder, saved(case)[1])
        return made[case]

    return get


def compile_to(folder, checkpoint):
    artifact = mc.compile(checkpoint, db=folder / "records.db", max_context=CONTEXT)
    assert artifact.manifest.quant == "none"
    return artifact.save(folder / "model.mimo")


def every_position(module, ids):
    """Logits ``[n, V]`` after each token of a prompt."""
    session = module.session()
    parts = [
        rows.copy() for hidden in session.chunks(ids) for rows in session.logits(hidden.copy())
    ]
    return np.concatenate(parts)


def relative(found, expected):
    assert expected.std() > 0.1, "the reference must not be trivial"
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def prove(path, model, tools):
    """Compare an artifact with the transformers model of the same weights."""
    module = mc.load(path)
    assert {f"step_{t}" for t in (1, 4, 16, 64)} <= set(module.entries)
    ids = tools.prompt(LENGTHS[-1])
    # attention is causal: one pass over the longest prompt has the last logits of all of them
    expected = tools.logits_of(model, ids).numpy()
    assert relative(every_position(module, ids), expected) < 1e-4
    for length in LENGTHS:
        session = module.session()
        (last,) = session.logits(session.append(ids[:length]))
        assert relative(last, expected[length - 1 : length]) < 1e-4, length
    logprobs = expected - np.logaddexp.reduce(expected.astype(np.float64), axis=1, keepdims=True)
    scores = logprobs[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(module.token_logprobs(ids), scores, atol=1e-4 * abs(scores).max())
    for length in (6, 21, 62):  # the new tokens cross the window and, at 64, the longest step
        wanted = tools.greedy(model, ids[:length], 32)
        assert list(module.generate_ids(ids[:length], 32, stop_at_eos=False)) == wanted


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_artifact_equals_transformers(case, saved, compiled, tools):
    prove(compiled(case), saved(case)[0], tools)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_artifact_of_shards_is_the_same_file(case, saved, compiled, tools, tmp_path):
    model, _ = saved(case)
    shards = tmp_path / compiled(case).parent.name
    model.save_pretrained(shards, max_shard_size="60KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    path = compile_to(shards, shards)
    prove(path, model, tools)
    ours, whole = mc.load(path).manifest, mc.load(compiled(case)).manifest
    assert ours.members["weights.safetensors"] == whole.members["weights.safetensors"]
