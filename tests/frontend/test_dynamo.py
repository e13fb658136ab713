"""`torch.compile(backend="mimo")` where graphs, shapes, weights and states are not fixed."""

import copy

import pytest
import torch
from torch import nn

from mimo_compile.errors import UsageError

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, backend="mimo")


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Branches(nn.Module):
    """Goes the way that the data say."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        h = self.second(h) if h.sum() > 0 else h * 3 - 1
        return torch.relu(h) + 1


@torch.no_grad()
def test_graph_breaks_take_both_ways():
    module = Branches().eval()
    run = compiled(module)
    x = torch.randn(3, 4)
    for sign in (1, -1):
        module.first.bias.fill_(5.0 * sign)
        close(run(x), module(x))


@torch.no_grad()
def test_other_shapes_and_empty_batches():
    module = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 3)).eval()
    run = compiled(module)
    for rows in (4, 2, 1, 0, 5, 4):
        x = torch.randn(rows, 6)
        close(run(x), module(x))
    x = torch.randn(6, 4).T
    close(run(x), module(x))


class Counter(nn.Module):
    """Changes a buffer and its input, and returns a number beside tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("fixed", torch.ones(4))
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        self.seen.add_(x.sum(0))
        x.mul_(2)
        return self.out(x) + self.seen * self.fixed, x.shape[0]


@torch.no_grad()
def test_states_change_as_in_eager_mode():
    module = Counter().eval()
    twin = copy.deepcopy(module)
    run = compiled(module)
    for _ in range(3):
        x = torch.randn(2, 4)
        mine, other = x.clone(), x.clone()
        found, expected = run(mine), twin(other)
        close(found[0], expected[0])
        assert found[1] == 2
        close(mine, other)
        close(module.seen, twin.seen)


@torch.no_grad()
def test_changed_and_exchanged_weights_are_seen():
    module = nn.Linear(4, 4).eval()
    run = compiled(module)
    x = torch.randn(3, 4)
    close(run(x), module(x))
    module.weight.mul_(2)
    close(run(x), module(x))
    module.load_state_dict(nn.Linear(4, 4).state_dict())
    close(run(x), module(x))
    module.weight = nn.Parameter(torch.randn(4, 4))
    close(run(x), module(x))


@torch.no_grad()
def test_instances_of_one_class_keep_their_own_weights():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)

        @torch.compile(backend="mimo")
        def forward(self, x):
            return self.out(x).relu()

    blocks = [Block().eval() for _ in range(3)]
    x = torch.randn(2, 4)
    for block in (*blocks, *blocks):
        close(block(x), block.out(x).relu())


def test_gradients_are_refused_where_they_are_asked_for():
    module = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    y = compiled(module)(x)
    close(y, module(x))
    assert y.requires_grad
    with pytest.raises(UsageError, match="inference"):
        y.sum().backward()


def test_inference_mode_and_functions():
    weight = torch.randn(4, 4)

    @torch.compile(backend="mimo")
    def function(x, power):
        return (x @ weight).tanh() ** power

    with torch.inference_mode():
        for power in (2, 3):
            x = torch.randn(3, 4)
            close(function(x, power), (x @ weight).tanh() ** power)
