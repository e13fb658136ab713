"""Starts tuning processes quickly: imports all they need once, then forks one for each line of its input.

A line is JSON: ``db``, ``scratch``, ``log``, ``seed``, ``trials``, ``mark``. The answer is the process id.
The process appends to its log what is stored, as soon as it is acknowledged, and how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (what a search needs)
import xgboost  # noqa: F401
from zoo_schedules import Many

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.measure import Measurer, Timing
from mimo_compile.search.tune import tune_workloads

QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05, repeats=0)


def tune(order: dict[str, Any]) -> None:
    """Search as asked; all that is said goes to the log."""
    os.setsid()
    os.environ["MIMO_TEST_MARK"] = order["mark"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def show(event: Any) -> None:
        if event.record is not None:
            os.write(log, f"stored {event.record.phase} {event.record.key}\n".encode())

    hardware = local_cpu()
    device = DeviceModel.guess(hardware)
    scratch = Path(order["scratch"])
    with (
        Database(order["db"]) as db,
        Measurer(hardware, device=device, timing=QUICK, builders=1, scratch=scratch) as measurer,
    ):
        result = tune_workloads(
            {parse_workload("embed:t=4,v=24,d=32"): 1.0}, hardware, trials=order["trials"], db=db,
            device=device, measurer=measurer, schedules=[Many()], progress=show, seed=order["seed"],
            strategy="random",
        )  # fmt: skip
    os.write(log, f"finished {result.trials} {result.new_trials} {result.stopped}\n".encode())


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                tune(order)
                status = 0
            except BaseException as error:  # the log tells
                os.write(2, f"failed {type(error).__name__} {error}\n".encode())
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
