"""Modules that nobody here wrote: compiled, saved, loaded and by `torch.compile`, against eager."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "records.db"


def eager(module, *args, **kwargs):
    with torch.no_grad():
        return [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def arrays(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def close(found, expected, bound=1e-3):
    """Each output has the type of the expected one and lies within a relative bound."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a = a if isinstance(a, np.ndarray) else a.detach().float().numpy()
        assert a.shape == tuple(b.shape)
        wanted = b.double().numpy()
        error = np.abs(a.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-9)
        assert error <= bound, error


def both(module, inputs, db, bound=1e-3):
    """Compare both ways in with the eager module."""
    expected = eager(module, *inputs)
    compiled = mc.compile(module, example_inputs=inputs, db=db).module()
    close(arrays(compiled(*inputs)), expected, bound)
    with torch.no_grad():
        close(eager(torch.compile(module, backend="mimo"), *inputs), expected, bound)


class ConvNet(nn.Module):
    """A small image classifier."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, groups=2),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(16, 10)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return torch.log_softmax(self.head(self.features(x).mean((2, 3))), -1)


def tiny_config(kind, **more):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, **more
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


def bert():
    ids = torch.randint(0, 500, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 15:] = 0
    return tiny_config("Bert", vocab_size=500), {"input_ids": ids, "attention_mask": mask}


def vit():
    model = tiny_config("ViT", image_size=64, patch_size=16)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def conv():
    return ConvNet().eval(), {"x": torch.randn(2, 3, 32, 32)}


@pytest.fixture(scope="module")
def saved_artifact(db, tmp_path_factory):
    """Return a function: case -> (module, inputs, path of its artifact), made once."""
    made = {}

    def get(make):
        if make not in made:
            torch.manual_seed(0)
            module, inputs = make()
            artifact = mc.compile(module, example_inputs=inputs, db=db)
            path = tmp_path_factory.mktemp(make.__name__) / "model.mimo"
            made[make] = module, inputs, artifact.save(path)
        return made[make]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("make", [conv, bert, vit])
def test_artifact_on_disk_and_torch_compile_equal_eager(make, saved_artifact):
    module, inputs, path = saved_artifact(make)
    expected = eager(module, **inputs)
    loaded = mc.load(path)
    assert tuple(loaded.entries["main"].inputs) == tuple(inputs)
    close(arrays(loaded(*(t.numpy() for t in inputs.values()))), expected, 1e-4)
    with torch.no_grad():
        result, wanted = torch.compile(module, backend="mimo")(**inputs), module(**inputs)
    assert type(result) is type(wanted)
    close([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)], expected, 1e-4)


@pytest.mark.slow
def test_outputs_have_the_names_of_their_fields_and_masks_count(saved_artifact):
    _, inputs, path = saved_artifact(bert)
    loaded = mc.load(path)
    assert tuple(loaded.entries["main"].outputs) == ("last_hidden_state", "pooler_output")
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][1, 15:] = 7  # what the mask leaves out
    hidden = [loaded(*(t.numpy() for t in v.values()))[0] for v in (inputs, changed)]
    np.testing.assert_allclose(hidden[0][1, :15], hidden[1][1, :15], atol=1e-6)
    assert np.abs(hidden[0][1, 15:] - hidden[1][1, 15:]).max() > 0.1


class Several(nn.Module):
    """Outputs of every form."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8, padding_idx=0)
        self.out = nn.Linear(8, 4)

    def forward(self, ids, mask):
        y = self.out(self.table(ids))
        pooled = (y * mask[..., None]).sum(1)
        return {"y": y, "pair": (pooled, ids + 1), "none": None, "n": 3, "best": y.argmax(-1)}


@pytest.mark.slow
def test_integers_masks_and_nested_outputs(db):
    module = Several().eval()
    inputs = (torch.randint(0, 30, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
    both(module, inputs, db)
    compiled = mc.compile(module, example_inputs=inputs, db=db).module()
    assert tuple(compiled.entries["main"].outputs) == ("y", "pair_0", "pair_1", "best")
    assert [a.dtype.name for a in compiled(*inputs)] == ["float32", "float32", "int64", "int64"]
    with torch.no_grad():
        result = torch.compile(module, backend="mimo")(*inputs)
    assert result["none"] is None and result["n"] == 3
    # an id outside of the table: no number that could be taken for a result
    wrong = np.full((2, 5), 1 << 40)
    assert np.isnan(compiled(wrong, inputs[1].numpy())[0]).all()


class Options(nn.Module):
    """Arguments by name, of which only some are tensors."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 8)

    def forward(self, x, *, scale=None, add=0.0, negate=False):
        y = self.out(x)
        y = y if scale is None else y * scale + add
        return -y if negate else y


def test_arguments_by_name(db):
    module = Options().eval()
    inputs = {"x": torch.randn(3, 16), "scale": torch.randn(8), "add": 1.5, "negate": True}
    expected = eager(module, **inputs)
    compiled = mc.compile(module, example_inputs=inputs, db=db).module()
    assert tuple(compiled.entries["main"].inputs) == ("x", "scale")
    close(arrays(compiled(inputs["x"], inputs["scale"])), expected)
    with torch.no_grad():
        close([torch.compile(module, backend="mimo")(**inputs)], expected)


def test_dropout_is_off_and_training_modes_stay(db):
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    module[2].eval()
    x = torch.randn(3, 8)
    compiled = mc.compile(module, example_inputs=(x,), db=db).module()
    assert [m.training for m in module.modules()] == [True, True, True, False]
    close([compiled(x)], eager(module.eval(), x))
    for part, message in ((module[1], "dropout in training"), (module[2], "batch normalisation")):
        module.eval()
        part.train()
        with torch.no_grad(), pytest.raises(InputError, match=rf"{message}.*eval\(\)"):
            torch.compile(module, backend="mimo")(x)
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_modules(dtype, db):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval()
    x = torch.randn(2, 5, 32)
    exact = eager(layer, x)
    layer, x = layer.to(dtype), x.to(dtype)
    step = torch.finfo(dtype).eps
    both(layer, (x,), db, 4 * step)
    found = mc.compile(layer, example_inputs=(x,), db=db).module()(x)
    assert found.dtype.name == str(dtype).removeprefix("torch.")
    close([found.astype(np.float32)], exact, 8 * step)


def test_a_small_module_in_bfloat16(db):
    parts = (nn.Linear(16, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 8))
    module, x = nn.Sequential(*parts).eval().bfloat16(), torch.randn(3, 16).bfloat16()
    found = mc.compile(module, example_inputs=(x,), db=db).module()(x)
    assert found.dtype.name == "bfloat16"
    close([found.astype(np.float32)], eager(module, x), 2**-6)


class Rounded(nn.Module):
    """Rounds within a computation in float32."""

    def forward(self, x):
        return torch.exp(x.bfloat16().float()) - torch.tanh(x * 1.5).bfloat16().float()


@pytest.mark.slow
def test_explicit_rounding_is_kept(db):
    both(Rounded(), (torch.randn(3, 20),), db, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_encoder_layers(norm_first, db):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    expected = eager(module, x, src_key_padding_mask=mask)
    with torch.no_grad():
        found = torch.compile(module, backend="mimo")(x, src_key_padding_mask=mask)
    close([found], expected, 1e-4)
    close([torch.compile(module, backend="mimo")(x).detach()], eager(module, x), 1e-4)


OPERATORS = {
    "promotion": lambda x, i: (i * 2.5, i / 2, i + x[:, :, 0], i // 3, i % 3, 2 - i),
    "alpha": lambda x, i: (torch.add(x, x, alpha=2), torch.rsub(x, 2.0, alpha=3)),
    "ends": lambda x, i: (x[:, -1], x[..., -2], x[:, -2:], x[-1, -1, -1]),
    "index": lambda x, i: (
        x[torch.tensor([0, 2]), torch.tensor([1, -1])],
        x[:, torch.tensor([3, -4])],
        x[:, torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, -1])],
        x[torch.tensor([0, 1]), :, torch.tensor([2, 5])],
    ),
    "extremes": lambda x, i: (*x.max(1), *x.min(-1), x.amax((0, 2)), x.prod(-1)),
    "cumulative": lambda x, i: (x.cumsum(1), x.cumprod(-1), (i > 0).cumsum(-1)),
    "units": lambda x, i: (F.selu(x), F.elu(x, 2.0), F.celu(x, 0.5), F.softplus(x, 2.0, 1.0)),
    "norms": lambda x, i: (
        F.layer_norm(x, (6,)), F.rms_norm(x, (6,)), F.rms_norm(x, (6,), x[0, 0]),
        F.group_norm(x, 2),
    ),
    "causal": lambda x, i: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "scatter": lambda x, i: x.scatter(1, (x[:, :1] > 0).long(), 9.0),
    "pools": lambda x, i: (F.max_pool1d(x, 2), F.one_hot(i.abs(), 6), F.unfold(x[None], 2)),
}  # fmt: skip


FAST = ("promotion", "ends", "index")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OPERATORS],
)
def test_operators_that_were_wrong_or_refused(name, db):
    class One(nn.Module):
        def forward(self, x, i):
            return OPERATORS[name](x, i)

    x, i = torch.randn(3, 4, 6), torch.randint(-5, 6, (3, 4))
    module = One()
    compiled = mc.compile(module, example_inputs=(x, i), db=db).module()
    expected = eager(module, x, i)
    found = arrays(compiled(x, i))
    assert [str(a.dtype) for a in found] == [str(t.dtype)[6:] for t in expected]
    close(found, expected, 1e-5)


class Spectrum(nn.Module):
    """Has no kernel."""

    def forward(self, x):
        return torch.fft.rfft(x).abs()


class Largest(nn.Module):
    """TVM imports it but could only call into its own library."""

    def forward(self, x):
        return x.topk(2).values


class Masked(nn.Module):
    """An extent that depends on the data."""

    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize(
    ("part", "operator"),
    [(Spectrum, "aten._fft_r2c.default"), (Largest, "aten.topk.default"), (Masked, "aten.index")],
)
def test_what_cannot_be_imported_is_named_with_its_place(part, operator, db):
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), part())).eval()
    x = torch.randn(2, 4)
    with pytest.raises(InputError) as caught:
        mc.compile(module, example_inputs=(x,), db=db)
    assert "1.1: " + part.__name__ in str(caught.value)
    assert operator in str(caught.value) or part is Masked
    if part is not Masked:  # TorchDynamo leaves that operator to eager mode
        with torch.no_grad(), pytest.raises(InputError, match=f"1.1: {part.__name__}"):
            torch.compile(module, backend="mimo")(x)


class Counter(nn.Module):
    """Keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        self.seen.add_(x.sum(0))
        return self.out(x) + self.seen


class Overwrites(nn.Module):
    """Changes its input."""

    def forward(self, x):
        return x.mul_(2) + 1


@pytest.mark.parametrize(
    ("module", "message"), [(Counter(), "buffer seen"), (Overwrites(), "input x")]
)
def test_an_artifact_of_what_changes_its_state_is_refused(module, message, db):
    with pytest.raises(InputError, match=message):
        mc.compile(module, example_inputs=(torch.randn(2, 4),), db=db)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.randn(0, 4),), UsageError, r"no elements: \[0, 4\]"),
        (torch.randn(2, 4), UsageError, "example_inputs is a Tensor"),
        ({}, UsageError, "needs example inputs"),
        ((torch.randn(2, 5),), InputError, "torch.export failed"),
    ],
)
def test_bad_examples_are_refused(inputs, error, message, db):
    with pytest.raises(error, match=message):
        mc.compile(nn.Linear(4, 4), example_inputs=inputs, db=db)


def test_a_module_without_a_kernel_is_refused(db):
    with pytest.raises(InputError, match="every output is an input or a constant"):
        mc.compile(nn.Identity(), example_inputs=(torch.randn(2),), db=db)
