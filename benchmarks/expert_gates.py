"""Train gates that foresee experts, and judge them beside the routers of later layers asked too early.

    python benchmarks/expert_gates.py t.mimo -o gates.safetensors

The idea is that of "Pre-gated MoE" (arXiv 2308.12066): a gate in one layer names the experts of the next.
There the model is trained to take what the gate says; here the model stays as it is, and gates learn to say
what its routers will choose (`run --expert-memory SIZE --pre-gates FILE` loads by them, ahead of need). A
gate is linear in the rows that a layer's experts get. It is trained by logistic regression on the
artifact's own choices for text that the built-in model was trained on, and judged on text that it was not.

Recall is the part of the needs (a token and one of its experts) that are among as many foreseen as a token
has; `named` are all that are probable enough to be loaded ahead of need.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mimo_compile.runtime import ExpertMemory, load
from mimo_compile.runtime.expert_calls import ExpertCall
from mimo_compile.runtime.foresight import LIKELY, Rows, embeddings
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.pregate import BEGIN, Gate, Pair, PreGates
from mimo_compile.tiny import corpus

AHEAD = 2
"""Layers that gates look ahead."""
WINDOW = 512
"""Tokens of a text."""
DECAY = 1e-4
"""Of the squares of a gate's weights, for columns of unit variance."""


@dataclass
class Notes:
    """What the layers of N tokens were given and chose."""

    rows: dict[int, np.ndarray]
    """float32 ``[N, D]``: what each layer's experts got, and at `BEGIN` the embeddings."""
    chosen: np.ndarray
    """int ``[N, L, k]``."""
    early: dict[Pair, np.ndarray]
    """``[N, k]``: what a later layer's router says of a layer's rows."""
    first: np.ndarray
    """bool ``[N]``: whether a text begins."""


def noted(module: Module, windows: Iterable[Sequence[int]]) -> Notes:
    """Read texts with an artifact whose experts are all in slots, and note what its layers do."""
    kept: dict[object, list[np.ndarray]] = defaultdict(list)
    for name in [name for name in module.entries if name.startswith("step_")]:
        watched(module, name, kept)
    first: list[bool] = []
    for window in windows:
        for _ in module.session().chunks(window):
            pass
        first += [True] + [False] * (len(window) - 1)
    of = {key: np.concatenate(parts) for key, parts in kept.items()}
    layers = sorted(key[1] for key in of if key[0] == "ids")
    return Notes(
        {key[1]: array for key, array in of.items() if key[0] == "rows"},
        np.stack([of["ids", layer] for layer in layers], 1),
        {key[1]: array for key, array in of.items() if key[0] == "early"}, np.array(first),
    )  # fmt: skip


def watched(module: Module, name: str, kept: dict[object, list[np.ndarray]]) -> None:
    """Make an entry point keep what its layers are given and choose."""
    bound = module.bind(name)
    calls = bound.program.calls
    experts = [at for at, (made, _) in enumerate(bound.calls) if isinstance(made, ExpertCall)]
    count = bound.array(calls[experts[0]].args[0]).shape[0]
    rows = Rows(bound.inputs["pos"], count)

    def then(at: int, after: Callable[[], None]) -> None:
        function, arguments = bound.calls[at]

        def both() -> None:
            function(*arguments)
            after()

        bound.calls[at] = both, ()

    def keep(key: object, array: np.ndarray) -> None:
        kept[key].append(array[~rows.others].copy())

    def of_layer(call: ExpertCall, x: np.ndarray, ids: np.ndarray) -> None:
        keep(("rows", call._layer), x)
        keep(("ids", call._layer), ids)
        for says in call._ahead:
            keep(("early", (call._layer, says.layer)), says._ids)

    for at in experts:
        x, ids = (bound.array(i) for i in calls[at].args[:2])
        made = bound.calls[at][0]
        then(at, lambda made=made, x=x, ids=ids: of_layer(made, x, ids))
    begin = embeddings(bound, experts[0])
    table = bound.array(calls[begin].args[-1])
    then(begin, lambda: keep(("rows", BEGIN), table))
    function, arguments = bound.calls[0]
    bound.calls[0] = rows.then, (function, *arguments)


def windows_of(module: Module, texts: Iterable[str], tokens: int) -> list[list[int]]:
    """Return so many tokens of texts, in windows."""
    out: list[list[int]] = []
    for text in texts:
        ids = [0, *module.tokenizer.encode(text).ids]
        for at in range(0, len(ids), WINDOW):
            if tokens <= 0:
                return out
            out.append(ids[at : at + min(WINDOW, tokens)])
            tokens -= len(out[-1])
    return out


def pairs_of(layers: int) -> list[Pair]:
    """Return who foresees whom: the next layers, and at the end those of the next token."""
    out = [(BEGIN, layer) for layer in range(min(AHEAD, layers))]
    for layer in range(layers):
        out += [(layer, (layer + step) % layers) for step in range(1, min(AHEAD, layers) + 1)]
    return out


def sides(notes: Notes, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that a gate sees, and the experts that it should foresee from each."""
    seen, foreseen = pair
    rows, chosen = notes.rows[seen], notes.chosen[:, foreseen]
    if foreseen > seen:
        return rows, chosen
    follows = ~notes.first[1:]  # of the token after it, where it has one
    return rows[:-1][follows], chosen[1:][follows]


def trained(rows: np.ndarray, chosen: np.ndarray, experts: int) -> Gate:
    """Fit a gate by logistic regression for each expert, with L-BFGS from zero: the same each time."""
    x = torch.from_numpy(rows)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    wanted = torch.zeros(len(x), experts)
    wanted.scatter_(1, torch.from_numpy(chosen.astype(np.int64)), 1.0)
    weight = torch.zeros(experts, x.shape[1], requires_grad=True)
    bias = torch.zeros(experts, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight.T + bias, wanted)
        value = value + DECAY * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        plain = weight / scale
        return Gate(plain.numpy(), (bias - plain @ mean).numpy())


def recall(foreseen: np.ndarray, chosen: np.ndarray) -> float:
    """Return the part of what was chosen ``[N, k]`` that is among what was foreseen ``[N, k]``."""
    return float((chosen[:, :, None] == foreseen[:, None, :]).any(-1).mean())


def best(likely: np.ndarray, chosen: int) -> np.ndarray:
    """Return the experts ``[N, chosen]`` that are most probable by ``[N, E]``."""
    return np.argsort(-likely, -1, kind="stable")[:, :chosen]


def spelled(pair: Pair, layers: int) -> str:
    seen = "embeddings" if pair[0] == BEGIN else f"layer {pair[0] + 1}"
    return f"{seen} → {pair[1] + 1}" + (" of the next token" if pair[1] <= pair[0] else "")


def main() -> None:
    """Read, train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "artifact", type=Path, help="of the built-in model, or one with its tokenizer"
    )
    parser.add_argument("-o", "--output", type=Path, help="write the gates: OUT.safetensors")
    parser.add_argument("--tokens", type=int, default=20000, help="to train on")
    parser.add_argument("--held-out", type=int, default=10000, help="to judge on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    module = load(args.artifact, threads=1, expert_memory=ExpertMemory(1 << 50, ahead=AHEAD))
    assert module.experts is not None
    texts, stacks = corpus.collect(), module.experts.stacks
    order = np.random.default_rng(0).permutation(len(texts.train))
    some = windows_of(module, (texts.train[i].text for i in order), args.tokens)
    learned = noted(module, some)
    module = load(args.artifact, threads=1, expert_memory=ExpertMemory(1 << 50, ahead=AHEAD))
    held = noted(module, windows_of(module, (f.text for f in texts.held_out), args.held_out))
    layers, k = held.chosen.shape[1:]
    gates: dict[Pair, Gate] = {}
    begin = time.process_time()
    for pair in pairs_of(layers):
        gates[pair] = trained(*sides(learned, pair), stacks[pair[1]].shape.experts)
    seconds = time.process_time() - begin
    print(
        "| from → to | chance | router, early | gate | gate, on what it learned | named | recall of named |"
    )
    print("|---|---|---|---|---|---|---|")
    for pair, gate in gates.items():
        rows, chosen = sides(held, pair)
        likely = gate(rows)
        named = likely >= LIKELY
        cells = [
            spelled(pair, layers), f"{k / stacks[pair[1]].shape.experts:.1%}",
            f"{recall(held.early[pair], chosen):.1%}" if pair in held.early else "–",
            f"{recall(best(likely, k), chosen):.1%}",
            f"{recall(best(gate(sides(learned, pair)[0]), k), sides(learned, pair)[1]):.1%}",
            f"{named.sum(1).mean():.2f}", f"{np.take_along_axis(named, chosen, 1).mean():.1%}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print(f"\n{len(learned.chosen)} tokens to learn from in {seconds:.1f} s of CPU time")
    if args.output:
        PreGates(tuple(stack.label for stack in stacks), gates).save(args.output)


if __name__ == "__main__":
    main()
