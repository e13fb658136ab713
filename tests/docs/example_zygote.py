"""Runs scripts quickly: imports all that examples need once, then forks one process for each.

A line of the input is JSON: ``script``, ``folder`` (to work in), ``environment``, ``out`` and ``err`` (files
for what it prints). The answer is the exit code, or the negative number of the signal it died of.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any

import safetensors.torch  # noqa: F401
import torch.export
import torch.fx.experimental.proxy_tensor  # noqa: F401
import xgboost  # noqa: F401

from mimo_compile import _tvm, api, search  # noqa: F401
from mimo_compile.frontend import exported, huggingface  # noqa: F401
from mimo_compile.pipeline import build, graphs, plans, source  # noqa: F401
from mimo_compile.search import tune  # noqa: F401


def run(order: dict[str, Any]) -> None:
    """Be ``python SCRIPT`` in a folder, as far as a script can tell."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = [order["script"]]
    sys.path[0] = order["folder"]
    runpy.run_path(order["script"], run_name="__main__")


def main() -> None:
    """Serve until the input ends."""
    _tvm.compiler()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
