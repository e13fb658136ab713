"""The whole job on the built-in model: tune for a minute, compile, load, generate.

    python examples/demo.py

Writes build/demo/: tuning records (run it again and the search goes on), the artifact, a report page.
"""

import argparse
import time
from pathlib import Path

import mimo_compile as mc

QUANT = "w4g64a8"
PROMPTS = ("def ", "import os\n\n\nclass ", "    for i in range(")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time to tune")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"))
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    records, file = args.folder / "records.db", args.folder / "tiny.mimo"
    begin = time.perf_counter()

    heading(f"1. tune: which kernels are fast here? ({args.seconds:.0f} s)")
    tuned = mc.tune("tiny", quant=QUANT, seconds=args.seconds, db=records, progress=Narrator())
    show_speedups(tuned)

    heading("2. compile: the whole model with the kernels that won")
    start = time.perf_counter()
    artifact = mc.compile("tiny", quant=QUANT, db=records)
    artifact.save(file)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB in {time.perf_counter() - start:.1f} s")
    show_plan(artifact)

    heading("3. load and generate (no torch, no compiler needed for this part)")
    start = time.perf_counter()
    model = mc.load(file)
    print(f"loaded in {time.perf_counter() - start:.2f} s")
    for prompt in PROMPTS:
        show_text(model, prompt, args.tokens)
    print(f"\nall in {time.perf_counter() - begin:.0f} s. Look closer with:")
    print(f"  mimo-compile report {records} -o {args.folder / 'report.html'}")
    print(f"  mimo-compile inspect {file}")
    print(f"  mimo-compile verify {file}")


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


class Narrator:
    """Says how the search goes, every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, event) -> None:
        now = time.monotonic()
        if event.kind == "measured" and now - self.last >= 5:
            self.last = now
            best = f"best {event.best_us:.1f} us" if event.best_us else "nothing correct yet"
            print(f"  {event.trials} candidates measured; {event.workload}: {best}", flush=True)


def show_speedups(tuned) -> None:
    rows = [w for w in tuned.workloads if w.speedup is not None]
    rows.sort(key=lambda w: -w.weight * w.default.latency_us)
    print(f"{tuned.new_trials} candidates measured; tuned over default, measured side by side:")
    for w in rows[:16]:
        line = f"{w.default.latency_us:9.1f} us -> {w.best.latency_us:8.1f} us  {w.speedup:5.2f}x"
        print(f"  {line}  {w.workload}  {w.best.record.schedule}")
    if len(rows) > 16:
        print(f"  ... and {len(rows) - 16} more")
    before = sum(w.weight * w.default.latency_us for w in rows)
    after = sum(w.weight * w.best.latency_us for w in rows)
    if after:
        print(f"  all {len(rows)} together, weighted by calls: {before / after:.2f}x")


def show_plan(artifact) -> None:
    step = ("step_1", "head_1")
    rows = []
    for choice in artifact.manifest.plan:
        calls = sum(choice.calls.get(entry, 0) for entry in step)
        if calls:
            rows.append((calls * (choice.latency_us or 0.0), calls, choice))
    rows.sort(key=lambda row: -row[0])
    measured = sum(row[0] for row in rows if row[2].source == "measured")
    print("kernels of one decoding step (calls x time of one):")
    for total, calls, choice in rows[:14]:
        knobs = " ".join(f"{k}={v}" for k, v in choice.config.items())
        print(f"  {total:8.1f} us  {calls:2d} x {choice.workload}")
        how = "measured" if choice.source == "measured" else "default, time predicted"
        print(f"               {choice.schedule} {knobs} ({how})")
    total = sum(row[0] for row in rows)
    print(f"  {total:8.1f} us in all {len(rows)} kernels, {measured:.1f} us of it measured")


def show_text(model, prompt: str, tokens: int) -> None:
    from mimo_compile.runtime import Stats

    stats = Stats()
    print(f"\n--- {prompt!r}")
    print(prompt, end="")
    for piece in model.generate(prompt, tokens, stats=stats):
        print(piece, end="", flush=True)
    rate = stats.decode_tokens_per_s
    figures = f"{stats.new_tokens} tokens" + (f", {rate:,.0f} tokens/s" if rate else "")
    if stats.joules_per_token is not None:
        figures += f", {stats.joules_per_token:.4g} J/token ({stats.joules_source})"
    print(f"\n--- {figures}")


if __name__ == "__main__":
    main()
