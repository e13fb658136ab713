"""Whole-model plans side by side: fastest, least energy within some slack, least energy; what planning takes.

Nothing is measured: times and joules are those of the records. A model is the built-in `tiny`, a checkpoint's
folder, or an artifact (which is fastest to read: no weights are touched). `benchmarks/end_to_end.py FOLDER
--prepare` makes a random Llama of the 1B class.

    python benchmarks/whole_model_plan.py tiny
    python benchmarks/whole_model_plan.py tiny FOLDER/llama1b --quant w4g64a8 --slack 1.01 1.05 1.2
    python benchmarks/whole_model_plan.py FOLDER/llama1b-w4g64a8-2.mimo --db records.db
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from mimo_compile.api import is_artifact
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline.plans import (
    compare_plans,
    config_change,
    measured_share,
    problem_of_artifact,
    problem_of_model,
    sources,
)
from mimo_compile.search.database import open_records

SHOWN = 4
"""Kernels that plans differ in, of most time, that are told of."""


def problem_of(source, settings):
    """Read what to plan for; return it with the seconds that took."""
    begin = time.perf_counter()
    if is_artifact(source):
        from mimo_compile.runtime.container import open_artifact

        parts = open_artifact(source, for_this_machine=False)
        problem = problem_of_artifact(parts, settings.threads)
    else:
        from mimo_compile.pipeline.source import open_source

        hardware = local_cpu().with_threads(settings.threads)
        opened = open_source(source, quant=settings.quant, max_context=settings.max_context)
        problem = problem_of_model(opened.graphs, hardware)
    return problem, time.perf_counter() - begin


def planned(problem, db, objectives, repeat):
    """Plan several times; return the plans with the median seconds of gathering and of each plan."""
    runs = [compare_plans(problem, db, objectives) for _ in range(repeat + 1)][1:]
    gathered = statistics.median(r.gathered_s for r in runs)
    seconds = [statistics.median(r.plans[i].seconds for r in runs) for i in range(len(objectives))]
    return runs[0], gathered, seconds


def show(name, found, gathered, seconds, read_s):
    """Print one model: a row for each plan, then which kernels change."""
    first, problem = found.plans[0], found.problem
    (meter,) = {p.energy_source for p in found.plans}
    origin = ", ".join(f"{n} {s}" for s, n in sorted(sources(first).items()))
    print(
        f"\n### {name}: {len(problem.calls)} kernels, {problem.hardware.threads} threads\n\n"
        f"Model read in {read_s:.1f} s; options gathered from records in {1e3 * gathered:.0f} ms. "
        f"Kernels of the first plan: {origin}; {100 * measured_share(first):.0f} % of its time is measured.\n"
    )
    steps = [e for e in ("step_1", "main") if e in found.entry_totals(first)]
    titles = ["plan", "latency us", "", f"energy mJ, {meter}", ""]
    titles += [f"{e} us" for e in steps] + ["other kernels", "planned in ms"]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for plan, s in zip(found.plans, seconds, strict=True):
        cells = [
            str(plan.objective),
            f"{plan.latency_us:,.1f}", f"{100 * (plan.latency_us / first.latency_us - 1):+.2f} %",
            f"{plan.energy_mj:,.3f}", f"{100 * (plan.energy_mj / first.energy_mj - 1):+.2f} %",
            *(f"{found.entry_totals(plan)[e][0]:,.1f}" for e in steps),
            str(found.changed(plan)), f"{1e3 * s:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    differences = found.differences()
    cheapest = [str(p.objective) for p in found.plans].index("energy")
    print(
        f"\nPlans differ in {len(differences)} kernels."
        + (" Of most time, from the fastest plan to that of least energy:" if differences else "")
    )
    for d in differences[:SHOWN]:
        before, after = d.choices[0].option, d.choices[cheapest].option
        if before.candidate.schedule == after.candidate.schedule:
            how = (
                config_change(before.candidate.config, after.candidate.config)
                or "the same for least energy"
            )
        else:
            how = f"{before.candidate.schedule} -> {after.candidate.schedule}"
        print(
            f"- `{d.workload}`: {before.latency_us:.4g} -> {after.latency_us:.4g} us, "
            f"{before.energy_mj:.4g} -> {after.energy_mj:.4g} mJ; {how}"
        )
    if meter == "modelled":
        print("\nEnergies are modelled, not measured.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="tiny, a checkpoint's folder, or OUT.mimo")
    parser.add_argument("--quant", default="w4g64a8", help="of tiny and of folders")
    parser.add_argument("--slack", type=float, nargs="+", default=[1.05])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--db", type=Path, help="records beside those of the package")
    parser.add_argument(
        "--repeat", type=int, default=5, help="plans of which the median time is told"
    )
    settings = parser.parse_args()
    objectives = [
        "latency",
        *(f"energy@latency:{s:g}" for s in settings.slack),
        "energy",
        "edp",
        "ed2p",
    ]
    for model in settings.models:
        problem, read_s = problem_of(model, settings)
        with open_records(settings.db) as db:
            found, gathered, seconds = planned(problem, db, objectives, settings.repeat)
        show(Path(model).name, found, gathered, seconds, read_s)


if __name__ == "__main__":
    main()
