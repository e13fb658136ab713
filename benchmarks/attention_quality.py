"""Quality of every attention system on the built-in model at 4,096 tokens: perplexity and recall.

    python benchmarks/attention_quality.py --out quality.jsonl --folder models/tiny-4k
    python benchmarks/attention_quality.py --out quality.jsonl --folder models/tiny-4k \
        --gates models/tiny-4k-deltas/gates.safetensors
    python benchmarks/attention_quality.py --out quality.jsonl --speed 32768
    python benchmarks/attention_quality.py --out quality.jsonl --write docs/attention-quality.md

Each system runs as its definition says, in float32 (`mimo_compile/tiny/sparse.py`), on texts that no
training has seen: held-out code, and held-out code with random facts in it. A line is written for each
system, budget and task as soon as it is known; lines that the file has already, for the same weights, are
not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from attention_costs import decode_time, kept_bytes
from tokenizers import Tokenizer
from torch import Tensor

from mimo_compile.ir.ops import get_op
from mimo_compile.ir.policies import AttentionPolicy, Geometry, parse_policy
from mimo_compile.ir.workload import Workload
from mimo_compile.tiny import corpus
from mimo_compile.tiny.checkpoint import load
from mimo_compile.tiny.gates import Gate, load_gates
from mimo_compile.tiny.hysparse import load_hysparse
from mimo_compile.tiny.indexers import Indexer, IndexerShape, load_indexers
from mimo_compile.tiny.oracle import Oracle
from mimo_compile.tiny.recall import Sample, Writer
from mimo_compile.tiny.sparse import Cache, Run, dense_caches, roles_of
from mimo_compile.tiny.training_model import TinyModel

BUDGETS = (0.06, 0.12, 0.25, 0.5)
TASKS = ("code", "needles", "pairs", "copy")
SCORED = 512
"""Last tokens of a code text that are decoded and scored."""
BINS = 4
"""Parts of the text by which recall is told."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


Systems = dict[str, dict[float, AttentionPolicy]]


def policies(
    length: int,
    gate_block: int,
    gate_width: int,
    hysparse_block: int,
    indexer: tuple[int, int] = (4, 64),
) -> Systems:
    """Return each system's policy at each budget, a share of `length` tokens (0: it has none).

    indexer: heads and width.
    """
    found: Systems = {"full": {0: parse_policy("full")}}
    for share in BUDGETS:
        b = round(share * length)
        texts = {
            "window": f"window:size={b},every=0",
            "stream": f"stream:recent={b - 4}",
            "quest": f"quest:budget={b},dense=0",
            "seer": f"seer:budget={b},block={gate_block},gate={gate_width}",
            "lessismore": f"lessismore:budget={b}",
            "resa": f"resa:p={share},least=1",
            "resa, not rectified": f"resa:p={share},least=1,f=0",
            "moba": f"moba:block=64,k={max(1, b // 64)}",
            "tailorkv": f"tailorkv:budget={max(b, 64)},quantised=0",
            "hysparse": f"hysparse:budget={b},block={hysparse_block},every=6",
            "dsa": f"dsa:k={b},heads={indexer[0]},width={indexer[1]}",
        }  # fmt: skip
        for name, text in texts.items():
            found.setdefault(name, {})[share] = parse_policy(text)
        found.setdefault("exact blocks of 16", {})[share] = Oracle(budget=b)
        found.setdefault("exact tokens", {})[share] = Oracle(budget=b, block=1)
    for tau in (0.002, 0.008, 0.03):
        found.setdefault("sale", {})[tau] = parse_policy(f"sale:tau={tau}")
    return found


@dataclass(frozen=True)
class Text:
    """One text: ids, where decoding starts, and (but for code) what is asked."""

    sample: Sample
    ids: Tensor
    prompt: int


def texts(writer: Writer, task: str, count: int, length: int) -> list[Text]:
    """Make the texts of a task; the same writer seed gives the same texts."""
    found = []
    for _ in range(count):
        if task == "code":
            sample = writer.code(length)
            prompt = length - min(SCORED, length // 2)
        else:
            make = {
                "needles": lambda: writer.needles(length, 16, at_end=True, separator=1),
                "pairs": lambda: writer.pairs(length, length // 64, at_end=True, separator=1),
                "copy": lambda: writer.copy(length, at_end=True),
            }[task]  # fmt: skip
            sample = make()
            prompt = max(1, (min(a.start for a in sample.answers) - 1) // 32 * 32)
        found.append(Text(sample, torch.from_numpy(sample.ids.astype(np.int64)), prompt))
    return found


def told(model: TinyModel, text: Text, normed: Tensor) -> tuple[float, list[tuple[float, float]]]:
    """Return the mean loss (nats) behind the prompt and (depth, share of right tokens) of each answer.

    normed: hidden states ``[tokens behind the prompt, hidden]``. An answer of several tokens is right as a
    whole or not at all, but for copies, whose tokens count one by one.
    """
    logits = model.logits(normed[:-1])
    wanted = text.ids[text.prompt + 1 :]
    loss = F.cross_entropy(logits, wanted).item()
    right = logits.argmax(-1) == wanted
    answers = []
    for a in text.sample.answers:
        part = right[a.start - text.prompt - 1 : a.stop - text.prompt - 1].float()
        answers.append((a.depth, float(part.mean() if text.sample.kind == "copy" else part.min())))
    return loss, answers


def measure(
    model: TinyModel, policy: AttentionPolicy, gates: Mapping[int, Gate],
    indexers: Mapping[int, Indexer], found: list[Text], caches: list[list[Cache]] | None,
) -> dict[str, object]:  # fmt: skip
    """Run a policy on all texts of a task."""
    begin = time.perf_counter()
    losses, answers, seen, visible = [], [], 0.0, 0.0
    for i, text in enumerate(found):
        run = Run(model, policy, text.prompt, gates, indexers)
        loss, right = told(model, text, run.rows(text.ids, None if caches is None else caches[i]))
        losses.append(loss)
        answers += right
        seen, visible = seen + run.seen, visible + run.visible
    row: dict[str, object] = {"share": seen / visible if visible else 1.0}
    if found[0].sample.kind == "code":
        row["perplexity"] = math.exp(sum(losses) / len(losses))
    else:
        row["recall"] = sum(r for _, r in answers) / len(answers)
        bins: list[list[float]] = [[] for _ in range(BINS)]
        for depth, right_ in answers:
            bins[min(BINS - 1, int(depth * BINS))].append(right_)
        row["by_depth"] = [round(sum(b) / len(b), 4) if b else None for b in bins]
        row["answers"] = len(answers)
    row["texts"] = len(found)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def decode_bytes(policy: AttentionPolicy, model: TinyModel, length: int) -> float:
    """Return bytes that the global layers' attention must read at decode, over those of dense attention.

    Necessary bytes of the ops for float32 caches of `length` positions, the selectors' included.
    """
    c = model.config
    g = Geometry(1, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim, length)

    def read(*workloads: Workload | None) -> float:
        return sum(get_op(w.op).counts(w).bytes["dram"] for w in workloads if w is not None)

    whole = read(parse_policy("full").workloads(g).attend)
    total, layers = 0.0, 0
    for windowed, role in zip(c.hybrid_layer_pattern, roles_of(policy, model), strict=True):
        layers += not windowed
        if role.kind == "window":
            total += 0.0 if windowed else read(policy.workloads(g).attend)
        elif role.kind in ("full", "quantised"):
            total += whole
        else:
            steps = policy.workloads(g)
            if role.kind == "select":
                total += read(steps.select) + (whole if role.dense else read(steps.score))
            total += 0.0 if role.dense else read(steps.attend)
    return total / (layers * whole)


def _digest(*files: Path | None) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(b"-" if file is None else file.read_bytes())
    return found.hexdigest()[:12]


def _read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bench(args: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    model = load(args.folder)
    gates = load_gates(model.config, args.gates) if args.gates else {}
    hybrid = load_hysparse(load(args.folder), args.hysparse) if args.hysparse else None
    indexers = load_indexers(model.config, args.indexers) if args.indexers else {}
    sizes = next(iter(indexers.values())).shape if indexers else IndexerShape()
    shape = next(iter(gates.values())).shape if gates else None
    systems = policies(
        args.length, shape.block if shape else 64, shape.width if shape else 64,
        hybrid.shape.block if hybrid else 64, (sizes.heads, sizes.width),
    )  # fmt: skip
    wanted = args.systems.split(",") if args.systems else list(systems)
    memory(args, model, systems)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    held_out = corpus.encode(tokenizer, corpus.collect().held_out)
    base = args.folder / "model.safetensors"
    known = {(r["weights"], r["system"], r["budget"], r["task"]) for r in _read(args.out)}
    for task in args.tasks.split(","):
        found = texts(Writer(tokenizer, [held_out], [1.0], 1), task, args.texts, args.length)
        caches = None
        for name in wanted:
            own = {"seer": args.gates, "hysparse": args.hysparse, "dsa": args.indexers}
            if name in own and own[name] is None:
                continue
            extra = own.get(name)
            runner = hybrid if name == "hysparse" and hybrid is not None else model
            for budget, policy in systems[name].items():
                key = (_digest(base, extra), name, budget, task)
                if key in known or (args.budgets and budget not in (0, *args.budgets)):
                    continue
                if caches is None:
                    caches = [dense_caches(model, text.ids) for text in found]
                line = {
                    "weights": key[0], "system": name, "budget": budget, "task": task,
                    "policy": str(policy), "length": args.length,
                    **measure(
                        runner, policy, gates, indexers, found, None if name == "hysparse" else caches
                    ),
                    "bytes": None if name == "sale" or isinstance(policy, Oracle)
                    else decode_bytes(policy, runner, args.length),
                }  # fmt: skip
                note(args.out, line)


def memory(args: argparse.Namespace, model: TinyModel, systems: Systems) -> None:
    """Note what each system keeps, if it is not known of this very policy; nothing is run."""
    known = {_stated(r) for r in _read(args.out) if r["task"] == "memory"}
    for name, budgets in systems.items():
        for budget, policy in budgets.items():
            if (name, budget, str(policy), args.length) in known:
                continue
            if not isinstance(policy, Oracle):
                note(args.out, {
                    "weights": "any", "system": name, "budget": budget, "task": "memory",
                    "policy": str(policy), "length": args.length,
                    "keeps": kept_bytes(policy, model, args.length),
                })  # fmt: skip


def speed(args: argparse.Namespace) -> None:
    """Time the kernels of each system at heads as models have them, over ``args.speed`` keys.

    Gates and indexers are as large as models', too, so that policies are not those whose quality is measured.
    """
    systems = policies(args.speed, 64, 128, 64, (64, 128))
    wanted = args.systems.split(",") if args.systems else list(systems)
    known = {_stated(r) for r in _read(args.out) if r["task"] == "speed"}
    for name in wanted:
        for budget, policy in systems[name].items():
            if isinstance(policy, Oracle) or (name, budget, str(policy), args.speed) in known:
                continue
            if args.budgets and budget not in args.budgets:
                continue
            if name != "resa, not rectified" and (found := decode_time(policy, args.speed)):
                note(args.out, {
                    "weights": "any", "system": name, "budget": budget, "task": "speed",
                    "policy": str(policy), "length": args.speed, "time": found[0], "p10": found[1],
                    "p90": found[2],
                })  # fmt: skip


def _stated(row: dict[str, object]) -> tuple[object, ...]:
    """Return what a line that needs no weights is of."""
    return row["system"], row["budget"], row["policy"], row["length"]


def note(path: Path, line: dict[str, object]) -> None:
    """Add a line to the file, and show it."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def _percent(value: object) -> str:
    return "" if value is None else f"{100 * float(str(value)):.0f} %"


def tables(rows: list[dict[str, object]]) -> str:
    """Return the Markdown tables of a file's lines; of equal cells the last line counts."""
    cells = {(str(r["system"]), float(str(r["budget"])), str(r["task"])): r for r in rows}
    kept = {_stated(r): r["keeps"] for r in rows if r["task"] == "memory"}
    names = [n for n in dict.fromkeys(name for name, _, _ in cells) if n not in ("full", "sale")]
    out: list[str] = []

    def table(head: str, columns: list[str], body: list[tuple[str, list[str]]]) -> None:
        out.extend(
            ["", f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        )
        shown_rows = [(name, values) for name, values in body if any(values)]
        out.extend(f"| {name} | " + " | ".join(values) + " |" for name, values in shown_rows)

    def shown(name: str, budget: float, task: str, what: str = "") -> str:
        row = cells.get((name, budget, task))
        if row is None:
            return ""
        if what:
            return _percent(row.get(what))
        return f"{float(str(row['perplexity'])):.3f}" if task == "code" else _percent(row["recall"])

    body, timed = [], any(task == "speed" for *_, task in cells)
    for name, budget in [("full", 0.0), *((n, share) for n in names for share in BUDGETS)]:
        told_of = next((r for t in TASKS if (r := cells.get((name, budget, t)))), None)
        read = None if told_of is None else told_of["bytes"]
        found = [shown(name, budget, task) for task in TASKS]
        costs = [_percent(told_of and kept.get(_stated(told_of))), _percent(read)]
        row = cells.get((name, budget, "speed"))
        if timed:
            spread = "" if row is None else f" ({_percent(row['p10'])} to {_percent(row['p90'])})"
            costs.append(shown(name, budget, "speed", "time") + spread)
        if any(found):
            body.append((name, [f"{budget:.0%}" if budget else "", *found, *costs]))
    recalls = (f"{task} found" for task in TASKS[1:])
    heads = ["budget", "perplexity", *recalls, "keeps", "reads", *(["time"] if timed else [])]
    table("system", heads, body)
    places = [f"{i / BINS:.0%} to {(i + 1) / BINS:.0%}" for i in range(BINS)]
    deep = {n: cells.get((n, 0 if n == "full" else 0.12, "needles")) for n in ("full", *names)}
    body = [(n, [_percent(x) for x in r["by_depth"]]) for n, r in deep.items() if r]  # type: ignore[attr-defined]
    if body:
        table("recall: needles by depth, budget 12 %", places, body)
    sale = sorted(b for n, b, t in cells if n == "sale" and t == "code")
    body = []
    for tau in sale:
        kept = _percent(cells["sale", tau, "code"]["share"])
        body.append((f"{tau:g}", [kept, *(shown("sale", tau, t) for t in ("code", "needles"))]))
    if body:
        table("sale: tau", ["keys that prefill attends to", "perplexity", "recall: needles"], body)
    return "\n".join(out).strip()


def write(rows: list[dict[str, object]], page: Path) -> None:
    """Put the tables between the page's marks."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{head}{BEGIN}\n{tables(rows)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a cell")
    parser.add_argument("--folder", type=Path, help="the trained model")
    parser.add_argument("--gates", type=Path, help="its SeerAttention gates")
    parser.add_argument("--hysparse", type=Path, help="its HySparse variant")
    parser.add_argument("--indexers", type=Path, help="its DSA indexers")
    parser.add_argument(
        "--speed",
        type=int,
        metavar="KEYS",
        help="time the kernels of each system over so many keys",
    )
    parser.add_argument("--systems", help="names, by commas; all if left out")
    parser.add_argument("--budgets", type=float, nargs="*", help="some of 0.06 0.12 0.25 0.5")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--texts", type=int, default=8, help="texts of each task")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--write", type=Path, help="put the tables into this page and stop")
    args = parser.parse_args()
    if args.write:
        write(_read(args.out), args.write)
        return
    if args.speed:
        speed(args)
        return
    if args.folder is None:
        parser.error("--folder is missing: the model to judge")
    torch.set_num_threads(1)
    bench(args)


if __name__ == "__main__":
    main()
