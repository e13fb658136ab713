"""An LSTM for each layer, trained on the trace itself: windows of shares, and the mean of what followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mimo_compile.experts.forecast import WINDOW, Forecast, average, normalised
from mimo_compile.experts.trace import Floats

_LEAST = 16
"""Windows that are too few to learn from."""
_GAIN = 1e-9
"""Of the loss, in nats, that is more than rounding: 1e-9 are 0.005 % of each share."""
_TINY = 1e-6
"""Share that a logarithm is taken of at least."""


class _Net(nn.Module):
    """``[B, bins, E]`` -> corrections ``[B, E]`` of the logits of the window's mean; at first none."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(experts, hidden, batch_first=True)
        self.out = nn.Linear(hidden, experts)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        _, (last, _) = self.lstm(x)
        corrections: Tensor = self.out(last[-1])
        return corrections


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for matrices as small as these, waiting for others takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Adam:
    """Adam (arXiv 1412.6980). torch.optim would import torch's compiler, longer than a forecast takes."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self._parameters, self._rate, self._count = parameters, rate, 0
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def __call__(self, loss: Tensor) -> None:
        """Take one step down the gradient of a loss."""
        gradients = torch.autograd.grad(loss, self._parameters)
        self._count += 1
        with torch.no_grad():
            for p, g, (first, second) in zip(
                self._parameters, gradients, self._moments, strict=True
            ):
                first.lerp_(g, 0.1)
                second.lerp_(g * g, 0.001)
                size = (second / (1 - 0.999**self._count)).sqrt_().add_(1e-8)
                p.sub_(self._rate / (1 - 0.9**self._count) * first / size)


@dataclass(frozen=True)
class Lstm:
    """Forecasts the window's mean times the exponential of what an LSTM says, made to sum to 1.

    An untrained one is the average of the window. The loss is the cross entropy with the mean share over the
    horizon. The last windows (a fifth) are not trained on; the weights that are best there are kept, those
    before any training among them.
    """

    window: int = WINDOW
    hidden: int = 32
    bins: int = 20
    """A window is fed as the means of so many parts."""
    most: int = 128
    """Windows that are learned from, spread over the history."""
    rounds: int = 60
    """Passes over them."""
    rate: float = 5e-3
    seed: int = 0
    name: str = "lstm"

    def forecast(self, history: Floats, horizons: Sequence[int]) -> Forecast:
        """Forecast; see `Predictor`. Two traces that are equal get equal forecasts."""
        layers = history.shape[1]
        instead = average(history, self.window)
        out = {h: instead.copy() for h in horizons}
        short = set()
        for layer in range(layers):
            seen = history[~np.isnan(history[:, layer, 0]), layer]
            for h in horizons:
                found = self._learned(seen, h)
                if found is None:
                    short.add(h)
                else:
                    out[h][layer] = found
        notes = tuple(
            f"{len(history)} steps are too few to learn {h} ahead: the average instead"
            for h in sorted(short)
        )
        return Forecast({h: normalised(shares) for h, shares in out.items()}, notes)

    def _learned(self, seen: Floats, horizon: int) -> Floats | None:
        """Train on one layer ``[t, E]`` and return its shares ``[E]``; None: too little to learn from."""
        width = self.window
        last = len(seen) - width - horizon
        if last + 1 < _LEAST:
            return None
        begins = np.unique(np.linspace(0, last, min(self.most, last + 1)).astype(int))
        scale = np.maximum(seen.std(0), 1e-9)
        inputs, means = zip(
            *(self._window(seen[b : b + width], scale) for b in begins), strict=True
        )
        targets = [seen[b + width : b + width + horizon].mean(0) for b in begins]
        x, base, y = (torch.from_numpy(np.stack(part)) for part in (inputs, means, targets))
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(self.seed)
            net = self._train(x, base.clamp_min(_TINY).log(), y)
        now, mean = self._window(seen[-width:], scale)
        with torch.no_grad():
            change = net(torch.from_numpy(now[None]))[0].numpy()
        return np.asarray(mean * np.exp(change))

    def _window(self, rows: Floats, scale: Floats) -> tuple[Floats, Floats]:
        """Return a window ``[w, E]`` as the net sees it ``[bins, E]``, and its mean ``[E]``."""
        mean = rows.mean(0)
        parts = np.array_split(rows, min(self.bins, len(rows)))
        return np.stack([(part.mean(0) - mean) / scale for part in parts]), mean

    def _train(self, x: Tensor, base: Tensor, y: Tensor) -> _Net:
        net = _Net(x.shape[2], self.hidden).double()  # of losses that differ by 1e-7
        kept = max(1, len(x) // 5)
        learn, judge = slice(0, len(x) - kept), slice(len(x) - kept, None)

        def loss(part: slice) -> Tensor:
            found = torch.log_softmax(base[part] + net(x[part]), -1)
            return -(y[part] * found).sum(-1).mean()

        with torch.no_grad():
            best = float(loss(judge))
        state = {name: value.clone() for name, value in net.state_dict().items()}
        step = _Adam(list(net.parameters()), self.rate)
        for _ in range(self.rounds):
            step(loss(learn))
            with torch.no_grad():
                now = float(loss(judge))
            if now < best - _GAIN:
                best, state = now, {n: v.clone() for n, v in net.state_dict().items()}
        net.load_state_dict(state)
        return net
