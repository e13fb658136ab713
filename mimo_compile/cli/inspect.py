"""``mimo-compile inspect``: what is in an artifact, or what can be tried for a workload."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import need_extra, positive
from mimo_compile.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.container import Parts
    from mimo_compile.runtime.program import Choice, Entry, Manifest
    from mimo_compile.search.explain import Explanation

DESCRIPTION = """\
Show an artifact: entry points, plan, kernels, sizes; with --kernel why one kernel was chosen, or its
code, generated again from its schedule and config (of a GPU, as the artifact has it); with --dot the calls of
an entry point as a graph.
With --plan compare the plans that other objectives would give, from records alone. With --op show the
candidates of one workload: what was predicted, what was measured, and why the best one is it."""
EXAMPLE = """
mimo-compile inspect t.mimo
mimo-compile inspect t.mimo --plan
mimo-compile inspect t.mimo --kernel mpgemm --asm
mimo-compile inspect --op mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8
mimo-compile inspect --op mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8 --target cuda:sm_90a
"""

_LIMIT = 20  # candidates of --op
APART = ("name", "thresholds", "outside", "chosen_by")
"""What each layer has of its own, beside what its line of the table says."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "artifact",
        nargs="?",
        type=Path,
        metavar="OUT.mimo",
        help="an artifact; with --plan also SRC",
    )
    parser.add_argument(
        "--op", metavar="SPEC", help="candidates of a workload instead of an artifact"
    )
    parser.add_argument(
        "--kernel",
        metavar="NAME",
        help="one kernel: its symbol, its workload, or the start of either",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--tir", action="store_true", help="the kernel as TIR (needs [compile])")
    form.add_argument("--asm", action="store_true", help="the kernel as assembly (needs [compile])")
    form.add_argument(
        "--ptx",
        action="store_true",
        help="kernels of --op, or the kernel, as PTX (GPUs; needs nvcc)",
    )
    form.add_argument(
        "--sass", action="store_true", help="and as machine code (needs nvdisasm, too)"
    )
    form.add_argument("--cuda", action="store_true", help="the kernel as CUDA text (GPUs)")
    form.add_argument(
        "--dot", action="store_true", help="the calls of an entry in Graphviz's language"
    )
    parser.add_argument(
        "--entry", metavar="NAME", help="which entry --dot draws (default: the first)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="the plans for least latency, least energy within 5 %% of it, and least energy",
    )
    parser.add_argument(
        "--objective", metavar="O", help="a further plan of --plan; what is best for --op"
    )
    parser.add_argument("--quant", metavar="Q", help="with --plan SRC (default: none)")
    parser.add_argument(
        "--max-context", type=positive, metavar="N", help="with --plan SRC: longest sequence"
    )
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="T",
        help="of --op or --plan SRC (default: cpu); of --op also cuda:sm_80, cuda:sm_90a, sim:...",
    )
    parser.add_argument(
        "--limit", type=positive, default=_LIMIT, metavar="N", help="candidates of --op"
    )
    parser.add_argument(
        "--db", type=Path, metavar="FILE", help="tuning records of --op, --plan and --kernel"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was asked for; return 0."""
    _check(args)
    if args.op is not None:
        need_extra("inspect --op")
        from mimo_compile.cli.inspect_op import run_op

        return run_op(args)
    if args.plan:
        need_extra("inspect --plan")
        from mimo_compile.cli.inspect_plan import run_plan

        return run_plan(args)
    from mimo_compile.runtime.container import open_artifact

    parts = open_artifact(args.artifact, for_this_machine=False)
    if args.dot:
        return _dot(args, parts)
    if args.kernel:
        return _kernel(args, parts)
    return _artifact(args, parts)


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (args.artifact is None) == (args.op is None):
        raise UsageError("inspect needs either OUT.mimo or --op SPEC")
    code = args.tir or args.asm or args.cuda
    of_gpu = args.ptx or args.sass
    if args.op is not None and (args.kernel or code or args.dot or args.entry or args.plan):
        raise UsageError(
            "--kernel, --tir, --asm, --cuda, --dot, --entry and --plan go with OUT.mimo, not with --op"
        )
    if args.plan and (args.kernel or code or of_gpu or args.dot or args.entry):
        raise UsageError("--plan is about all kernels: it goes with none of the other views")
    if args.op is None and of_gpu and not args.kernel:
        raise UsageError(
            "--ptx and --sass go with --op and a GPU as --target, or with --kernel NAME"
        )
    if not args.plan and (args.quant is not None or args.max_context is not None):
        raise UsageError("--quant and --max-context go with --plan SRC")
    if not (args.plan or args.op) and (args.target != "cpu" or args.objective is not None):
        raise UsageError("--target and --objective go with --op or --plan, not with OUT.mimo")
    if args.op is None and args.limit != _LIMIT:
        raise UsageError("--limit goes with --op, not with OUT.mimo")
    if args.db is not None and (code or of_gpu or not (args.plan or args.op or args.kernel)):
        raise UsageError(
            "--db goes with --op, --plan or --kernel without --tir and --asm, or other code"
        )
    if args.dot and args.kernel:
        raise UsageError("--dot draws an entry: it does not go with --kernel")
    if args.entry is not None and not args.dot:
        raise UsageError("--entry goes with --dot")
    if code and not args.kernel:
        raise UsageError("--tir, --asm and --cuda need --kernel NAME")


def _artifact(args: argparse.Namespace, parts: Parts) -> int:
    from mimo_compile.cli.compile import summary
    from mimo_compile.cli.console import number, size, table
    from mimo_compile.cli.energy import NOTE, energy_columns, title
    from mimo_compile.runtime.zipform import WEIGHTS

    console: Console = args.console
    manifest = parts.manifest
    console.say(
        f"{args.artifact}: {manifest.name}, quantisation {manifest.quant}, schema {manifest.schema}"
    )
    console.say(f"target    {manifest.target.name}, {manifest.target.threads} threads")
    console.say(f"requires  {' '.join(manifest.target.features) or 'nothing beyond x86-64'}")
    console.say(f"attention {manifest.attention}")
    if manifest.gates is not None:
        console.say(f"gates     {manifest.gates.file}, sha256 {manifest.gates.sha256}")
    if manifest.pre_gates is not None:
        early = spans([row["name"] for row in layer_rows(manifest) if row["chosen_by"]])
        file = manifest.pre_gates
        console.say(
            f"pre-gates {file.file}, sha256 {file.sha256}: they choose the experts of {early}"
        )
    console.say(f"objective {manifest.objective}")
    if manifest.shapes_only:
        console.say("weights   none were read (--shapes-only): all are zeros")
    if batch_of(manifest) > 1:
        console.say(f"batch     {batch_of(manifest)} sequences at a time")
    if pages := summary(manifest)["pages"]:
        console.say(
            f"pages     {pages['pages']} of {pages['page']} positions for all of them, "
            f"{size(pages['bytes'])}"
        )
    if manifest.decoder is not None and manifest.decoder.adapters:
        console.say(f"adapters  {', '.join(manifest.decoder.adapters)}")
    console.say("built by  " + ", ".join(f"{n} {v}" for n, v in manifest.versions.items()))
    members = [(name, size(member.bytes)) for name, member in sorted(manifest.members.items())]
    console.say("\n" + table(members, ("member", "size"), right="lr"))
    rows = []
    for name, entry in parts.programs.entries.items():
        rows.append((name, _types(entry, entry.inputs), _types(entry, entry.outputs), len(entry.calls),
                     size(entry.arena_bytes)))  # fmt: skip
    console.say("\n" + table(rows, ("entry", "takes", "gives", "calls", "arena"), right="lllrr"))
    states = [(n, f"{s.dtype}{list(s.shape)}") for n, s in manifest.states.items()]
    from mimo_compile.runtime.pages import held_bytes, pooled_states

    held, pooled = sum(held_bytes(manifest).values()), pooled_states(manifest)
    arena = max((e.arena_bytes for e in parts.programs.entries.values()), default=0)
    weights = manifest.members[WEIGHTS].bytes
    planned = {"weights": weights, "states": held, "arena": arena}
    if manifest.target.kind == "cuda":
        from mimo_compile.cli.inspect_device import scratch_bytes

        planned["scratch"] = scratch_bytes(parts)
    console.say(
        f"\nmemory    {size(sum(planned.values()))} when all of it is in use: "
        + ", ".join(f"{name} {size(count)}" for name, count in planned.items())
        + ("" if "scratch" in planned else "; besides, workspace that kernels take as they run")
    )
    if states:
        times = f"each {batch_of(manifest)} times" if batch_of(manifest) > 1 else ""
        if pooled and times:
            times = f"{len(states) - len(pooled)} of them {batch_of(manifest)} times"
        console.say(
            f"\n{len(states)} states, {size(held)}, for example {states[0][0]} {states[0][1]}"
            + (f", {times}" if times else "")
        )
    layers = layer_rows(manifest)
    if layers:
        columns = ("layers", "attention", "window", "slots", "format", "follows", "state bytes")
        console.say("\n" + table(grouped(layers), columns, right="llrrllr"))
    for row in layers:
        if taus := row["thresholds"]:
            span = (
                f"{min(taus):.2g} to {max(taus):.2g}, 0 (dense) in {taus.count(0)} of {len(taus)}"
            )
            console.say(f"{row['name']}: thresholds of heads {span}")
    spread = [f"{row['name']} {row['outside']:.2f}" for row in layers if row["outside"]]
    if spread:
        console.say(f"attention outside of the best 5 % of the keys: {', '.join(spread)}")
    plan = sorted(manifest.plan, key=lambda c: (c.workload.partition(":")[0], c.workload))
    titles, joules = energy_columns([(c.energy_mj, c.energy_source) for c in plan])
    lines = [
        (
            c.workload, c.schedule, _config(c), sum(c.calls.values()), number(c.latency_us),
            *mj, c.source,
        )
        for c, mj in zip(plan, joules, strict=True)
    ]  # fmt: skip
    header = ("workload", "schedule", "config", "calls", "us", *titles, "source")
    console.say("\n" + table(lines, header, right="lllrr" + "r" * len(titles) + "l"))
    if title(None) in titles:
        console.say(NOTE)
    device = None
    if manifest.target.kind == "cuda":
        from mimo_compile.cli.inspect_device import show_device

        device = show_device(console, parts)
    console.result(
        {
            "ok": True, "path": args.artifact, **summary(manifest),
            "members": {n: m.bytes for n, m in manifest.members.items()},
            "programs": {
                n: {"calls": len(e.calls), "arena_bytes": e.arena_bytes}
                for n, e in parts.programs.entries.items()
            },
            "states": {n: {"shape": s.shape, "dtype": s.dtype} for n, s in manifest.states.items()},
            "state_bytes": held,
            "planned_bytes": planned,
            "layers": layers,
            "device": device,
        }
    )  # fmt: skip
    return 0


def batch_of(manifest: Manifest) -> int:
    """Return how many sequences may be in progress at once."""
    return manifest.decoder.batch if manifest.decoder is not None else 1


def layer_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what each layer of a decoder attends to and keeps, as plain values."""
    from mimo_compile.runtime.pages import held_bytes

    found = manifest.decoder.layers if manifest.decoder is not None else ()
    held = held_bytes(manifest)
    return [
        {
            "name": layer.name, "role": layer.role, "window": layer.window, "slots": layer.slots,
            "format": layer.format, "follows": layer.follows,
            "state_bytes": sum(held[n] for n in layer.states), "thresholds": layer.thresholds,
            "outside": layer.outside, "chosen_by": layer.chosen_by,
        }
        for layer in found
    ]  # fmt: skip


def grouped(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a line for each kind of layer: those that differ in name only stand together."""
    from mimo_compile.cli.console import size

    kinds: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        kind = tuple(value for key, value in row.items() if key not in APART)
        kinds.setdefault(kind, []).append(row["name"])
    out = []
    for (role, window, slots, kept, follows, held), names in kinds.items():
        many = f" x {len(names)}" if len(names) > 1 else ""
        out.append(
            (spans(names), role, window or "-", slots, kept, follows or "-", size(held) + many)
        )
    return out


def spans(names: list[str]) -> str:
    """Return names of layers shortly: ``layers.0 layers.2-4``."""
    out: list[tuple[str, int, int]] = []
    for name in names:
        stem, _, number = name.rpartition(".")
        at = int(number)
        if out and out[-1][0] == stem and out[-1][2] == at - 1:
            out[-1] = (stem, out[-1][1], at)
        else:
            out.append((stem, at, at))
    return " ".join(f"{s}.{a}" + (f"-{b}" if b > a else "") for s, a, b in out)


def _types(entry: Entry, names: dict[str, int]) -> str:
    parts = [
        f"{n} {entry.buffers[i].dtype}{list(entry.buffers[i].shape)}" for n, i in names.items()
    ]
    return ", ".join(parts)


def _config(choice: Choice) -> str:
    return " ".join(f"{k}={v}" for k, v in choice.config.items())


def find_choice(parts: Parts, name: str) -> Choice:
    """Return the choice that a name means.

    Raises:
        UsageError: none or several; the message lists some.
    """
    plan = parts.manifest.plan
    exact = [c for c in plan if name in (c.kernel, c.workload)]
    found = exact or [c for c in plan if c.kernel.startswith(name) or c.workload.startswith(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(c.workload for c in (found or plan)[:5])
    what = f"{len(found)} kernels begin with" if found else "no kernel is called"
    raise UsageError(f"{what} {name!r} (--kernel)", remedy=f"Give one of: {listed}, ...")


def _kernel(args: argparse.Namespace, parts: Parts) -> int:
    console: Console = args.console
    if args.cuda or args.ptx or args.sass:
        from mimo_compile.cli.inspect_device import show_code

        return show_code(args, parts, _one_of(parts, args.kernel))
    if not (args.tir or args.asm):
        choice = find_choice(parts, args.kernel)
        from mimo_compile.cli.compile import plan_row

        row = plan_row(choice)
        for name, value in row.items():
            console.say(f"{name:<16} {value if value is not None else '-'}")
        found = _explained(args, parts, choice)
        if found is not None:
            from mimo_compile.cli.why import show_why

            console.say()
            show_why(console, found)
        console.result({"ok": True, **row, "why": None if found is None else found.to_json()})
        return 0
    need_extra("inspect --tir and --asm")
    from mimo_compile.bench.runnable import hardware_of, kernel_of
    from mimo_compile.schedules.compile import assembly

    choice = _one_of(parts, args.kernel)
    kernel, hardware = kernel_of(choice, parts.manifest), hardware_of(parts.manifest)
    if kernel is None:
        raise UsageError(
            f"{choice.workload} has no schedule in this version, so its code cannot be shown again"
        )
    if kernel.name != choice.kernel:  # which is made of all that shapes the code
        console.log(f"note: {choice.schedule} has changed since, {choice.kernel} was other code")
    if kernel.func is None:
        raise UsageError(
            f"{choice.workload} is CUDA text: --tir and --asm show code of CPUs",
            remedy="use --cuda, --ptx or --sass",
        )
    text = kernel.func.script() if args.tir else assembly([kernel], hardware)
    console.say(f"# {choice.workload}\n# {choice.schedule} {_config(choice)}")
    console.say(text)
    console.result({"ok": True, "workload": choice.workload, "kernel": choice.kernel, "text": text})
    return 0


def _explained(args: argparse.Namespace, parts: Parts, choice: Choice) -> Explanation | None:
    """Explain a choice from the user's records, the package's and the artifact's own.

    None for a generic kernel, for a schedule that this version does not have, and without the [compile]
    extra, whose models it takes.
    """
    try:
        need_extra("inspect --kernel")
    except MissingExtra as error:
        args.console.log(f"why it was chosen is not told: {error}", 1)
        return None
    from mimo_compile.bench.runnable import hardware_of
    from mimo_compile.ir.ops import OPS
    from mimo_compile.ir.workload import Workload
    from mimo_compile.search.calibrate import device_model
    from mimo_compile.search.database import open_records
    from mimo_compile.search.explain import explain
    from mimo_compile.search.lookup import kept_records, summarise
    from mimo_compile.search.objective import parse_objective
    from mimo_compile.search.space import JointSpace

    workload = Workload.parse(choice.workload)
    if workload.op not in OPS:
        return None
    hardware = hardware_of(parts.manifest)
    try:
        space = JointSpace(workload, hardware)
    except UsageError as error:  # a machine that this version has no kernels for
        args.console.log(f"why it was chosen is not told: {error}", 1)
        return None
    chosen = space.adopt(choice.schedule, choice.config)
    if chosen is None:
        return None
    kept = kept_records(parts.texts.get("records.jsonl"))
    results = summarise(kept.get(choice.workload, ()))
    named = ((space.adopt(r.record.schedule, r.record.config), r) for r in results)
    extra = {
        c: r
        for c, r in named
        if c is not None and space.schedules[c.schedule].version == r.record.schedule_version
    }
    goal = parse_objective(parts.manifest.objective)
    with open_records(args.db) as db:
        return explain(space, db, device_model(hardware), goal, chosen, extra)


def _one_of(parts: Parts, name: str) -> Choice:
    """Return the choice that a name means; when it begins several, the one that is called most."""
    starts = [
        c for c in parts.manifest.plan if c.kernel.startswith(name) or c.workload.startswith(name)
    ]
    if len(starts) < 2 or any(name in (c.kernel, c.workload) for c in starts):
        return find_choice(parts, name)
    return max(starts, key=lambda c: sum(c.calls.values()))


def _dot(args: argparse.Namespace, parts: Parts) -> int:
    need_extra("inspect --dot")
    from mimo_compile.bench.runnable import written_arguments

    console: Console = args.console
    name = args.entry or parts.manifest.entries[0]
    if name not in parts.programs.entries:
        raise UsageError(
            f"there is no entry {name!r} (--entry)",
            remedy=f"use {', '.join(parts.manifest.entries)}",
        )
    entry = parts.programs.entries[name]
    writes = written_arguments(parts)
    text = dot(entry, name, writes, {c.kernel: c.workload for c in parts.manifest.plan})
    console.say(text)
    console.result({"ok": True, "entry": name, "dot": text})
    return 0


def dot(entry: Entry, name: str, writes: dict[str, set[int]], workloads: dict[str, str]) -> str:
    """Return an entry's calls in Graphviz's language: an edge where a call reads what another wrote.

    Args:
        entry: The program.
        name: Its name.
        writes: For each kernel the positions of the arguments that it writes.
        workloads: For each kernel its workload.
    """
    out = [
        f'digraph "{name}" {{',
        "  rankdir=TB; node [shape=box, fontname=monospace, fontsize=10];",
    ]
    writer: dict[Any, int] = {}
    for index, call in enumerate(entry.calls):
        label = f"{call.label}\\n{workloads.get(call.kernel, call.kernel)}"
        out.append(f'  n{index} [label="{label}"];')
        seen: set[int] = set()
        for at, argument in enumerate(call.args):
            buffer = entry.buffers[argument]
            place = (buffer.kind, buffer.source or buffer.offset)
            if (
                place in writer
                and writer[place] not in seen
                and at not in writes.get(call.kernel, set())
            ):
                seen.add(writer[place])
                out.append(f"  n{writer[place]} -> n{index};")
        for at in writes.get(call.kernel, set()):
            buffer = entry.buffers[call.args[at]]
            writer[buffer.kind, buffer.source or buffer.offset] = index
    return "\n".join([*out, "}"])


__all__ = ["DESCRIPTION", "EXAMPLE", "add_arguments", "dot", "find_choice", "run"]
