"""Search for the fastest kernel of one matrix-vector product, and look at what was found.

python examples/tune_one_op.py
"""

import argparse
import tempfile
from pathlib import Path

import mimo_compile as mc

OP = "mpgemm:m=1,n=1024,k=1024,w=w4g64,a=a8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default=OP)
    parser.add_argument("--trials", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tuned = mc.tune(args.op, trials=args.trials, db=Path(folder) / "records.db")
    (found,) = tuned.workloads
    print(
        f"{found.workload}: {found.trials} of {found.space_size} candidates, stopped by {tuned.stopped}"
    )
    for result in sorted(found.results, key=lambda r: r.latency_us)[:5]:
        knobs = " ".join(f"{k}={v}" for k, v in result.record.config.items())
        print(f"  {result.latency_us:8.1f} us  {result.record.schedule}  {knobs}")
    if found.speedup is not None:
        print(f"tuned over default: {found.speedup:.2f}x")
    print(f"{len(found.pareto)} on the Pareto front of latency and energy")


if __name__ == "__main__":
    main()
