"""What every measuring child does: obey its limits, answer one JSON line for each request line.

Started as ``python -m mimo_compile.search.measure.<role>_worker FD_IN FD_OUT PARENT BYTES``. Requests and
replies go through the two pipes; stdout and stderr belong to whatever code runs here.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

Handler = Callable[[dict[str, Any]], dict[str, Any]]
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
FILE_BYTES = 4 << 30
"""Largest file that a child may write."""


def bind_to_parent(parent: int) -> None:
    """Die with the parent, whatever it dies of; leave at once if it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what detaches itself stays to be found
    if os.getppid() != parent:
        os._exit(1)


def serve(handlers: Mapping[str, Handler], warm_up: Callable[[], None]) -> None:
    """Answer requests until the parent closes the pipe.

    A handler's exception becomes an ``error`` reply; what kills the process is the parent's business.
    """
    fd_in, fd_out, parent, memory = (int(a) for a in sys.argv[1:5])
    bind_to_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:  # a driver of GPUs reserves more addresses than any machine has memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    files = FILE_BYTES
    if (most := resource.getrlimit(resource.RLIMIT_FSIZE)[1]) != resource.RLIM_INFINITY:
        files = min(files, most)
    resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))
    warm_up()
    me = os.getpid()
    with (
        os.fdopen(fd_in, "r", encoding="utf-8") as requests,
        os.fdopen(fd_out, "w", encoding="utf-8") as replies,
    ):
        replies.write('{"ready":true}\n')
        replies.flush()
        for line in requests:
            request = json.loads(line)
            try:
                reply = {"ok": True, "value": handlers[request["do"]](request)}
            except MemoryError as error:
                reply = {"ok": False, "kind": "MemoryError", "message": str(error)}
            except Exception as error:  # the reply carries it
                reply = {"ok": False, "kind": type(error).__name__, "message": str(error)[-1500:]}
            if os.getpid() != me:  # a clone that some kernel made by fork
                os._exit(1)
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
