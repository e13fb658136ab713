"""The connection to a Ray cluster: one of this machine, that ends with the search, or one that runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from mimo_compile.errors import MimoError, MissingExtra, UsageError
from mimo_compile.search.farm.roles import LABEL
from mimo_compile.search.measure.cases import Scratch

_CONNECT_S = 5.0
OWN = "local"
"""Label of the one node of a cluster that is started here."""
_OBJECTS = 256 << 20
"""Bytes of a local cluster's object store: object code is small."""


def parse_on(text: str) -> str | None:
    """Return the address of ``ray:HOST:PORT``, or None for ``ray``, a cluster of this machine alone.

    Raises:
        UsageError: it is neither.
    """
    kind, colon, address = text.partition(":")
    host, _, port = address.rpartition(":")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
    if kind == "ray" and (not colon or (host and 0 < number < 65536)):
        return address or None
    raise UsageError(f"--on {text!r} is not understood", remedy="write ray, or ray:HOST:PORT")


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        MissingExtra: it is not.
    """
    if find_spec("ray") is None:
        raise MissingExtra("tune --on ray", extra="ray", missing="ray")


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # the latter: what no host can be called
        reason = getattr(error, "strerror", None) or error
        raise MimoError(
            f"no Ray cluster answers: {reason}",
            where=address,
            remedy="Start one there with: ray start --head --port " + port,
        ) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our own handlers: Ray installs one for SIGTERM that ends the process."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_token() -> bool:
    """Say whether this user has a token for Ray clusters, where Ray itself looks for one."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or Path("~/.ray/auth_token").expanduser().is_file()


def _variables(own: bool) -> dict[str, str]:
    """Return what Ray is to find in the environment of a process that starts a cluster or joins one."""
    out = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if own:
        out["RAY_NUM_REDIS_GET_RETRIES"] = "90"  # seconds for a busy machine to start
    if "RAY_AUTH_MODE" not in os.environ and (own or _has_token()):
        # `ray start` does the same where there is a token, whoever joins by an address must do it himself
        out["RAY_AUTH_MODE"] = "token"
        if own:
            out["RAY_AUTH_TOKEN"] = _TOKEN
    return {k: v for k, v in out.items() if k == "RAY_USAGE_STATS_ENABLED" or k not in os.environ}


def _reread() -> None:
    """Have Ray look at the environment again: it keeps what it read."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")


def _places(address: str, ray: Any) -> set[tuple[str, int]]:
    """Return the numeric addresses that an address stands for, those of this machine by its node's."""
    host, _, port = address.rpartition(":")
    found = {str(i[4][0]) for i in socket.getaddrinfo(host.strip("[]"), int(port))}
    if any(ip_address(f.partition("%")[0]).is_loopback for f in found):
        found.add(str(ray.util.get_node_ip_address()))
    return {(f, int(port)) for f in found}


def _check_same(address: str | None, ray: Any) -> None:
    """Refuse another cluster than the one to which this process is connected already."""
    there = str(ray.get_runtime_context().gcs_address)
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        if address is not None and _places(address, ray) & _places(there, ray):
            return
    raise UsageError(
        f"this process is connected to the Ray cluster at {there} already",
        where="ray" if address is None else f"ray:{address}",
        remedy=f"use ray:{there}, or call ray.shutdown() before",
    )


class Cluster:
    """A connection to Ray. One that was made by others is left as it is."""

    def __init__(self, address: str | None = None, *, cpus: int | None = None) -> None:
        """Connect, or start a cluster here, without dashboard and without telemetry.

        Args:
            address: ``HOST:PORT`` of a running cluster, of which this machine is a node; None: start one.
            cpus: CPUs that a cluster started here offers (None: all open to this process).

        Raises:
            MissingExtra: Ray is not installed.
            UsageError: this process is connected to another cluster.
            MimoError: the address does not answer, or Ray cannot be started or joined.
        """
        require_ray()
        self._scratch: Scratch | None = None
        self._before: dict[str, str | None] = {}
        self.ray: Any = sys.modules.get("ray")
        self._joined = self.ray is not None and self.ray.is_initialized()
        if self._joined:
            _check_same(address, self.ray)
            return
        if address is not None:
            _check_answers(address)
        changed = _variables(own=address is None)
        self._before = {k: os.environ.get(k) for k in changed}
        os.environ.update(changed)
        import ray

        _reread()
        self.ray = ray
        options: dict[str, Any] = {
            "log_to_driver": False, "configure_logging": False, "namespace": "mimo-compile",
        }  # fmt: skip
        if address is None:
            self._scratch = Scratch(Path(tempfile.gettempdir()))
            options |= {
                "address": "local", "num_cpus": cpus or len(os.sched_getaffinity(0)), "num_gpus": 0,
                "include_dashboard": False, "object_store_memory": _OBJECTS,
                "_temp_dir": str(self._scratch.path), "labels": {LABEL: OWN},
            }  # fmt: skip
        else:
            options["address"] = address
        try:
            with _own_signals():
                ray.init(**options)
        except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            self.close()
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise MimoError(
                f"Ray cannot be {'started' if address is None else 'joined'}: {first}",
                where=address or "",
                remedy=""
                if address is None
                else f"This machine must be a node of it: ray start --address {address}. If the cluster has "
                "a token, the same must be in ~/.ray/auth_token or RAY_AUTH_TOKEN here",
            ) from error

    @property
    def home(self) -> str:
        """The node of this process."""
        return str(self.ray.get_runtime_context().get_node_id())

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return what Ray knows of the nodes that are alive, by id."""
        return {n["NodeID"]: n for n in self.ray.nodes() if n["Alive"]}

    def on(self, node: str) -> Any:
        """Return the strategy that places something on one node and nowhere else."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id=node, soft=False)

    def close(self) -> None:
        """Disconnect; a cluster that was started here ends."""
        if not self._joined:
            with contextlib.suppress(Exception), _own_signals():  # it may be half started, or gone
                self.ray.shutdown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._before:
            self._before = {}
            _reread()
        if self._scratch is not None:
            self._scratch.close()
            Scratch().close()  # which sweeps away what killed workers left


_TOKEN = secrets.token_hex(32)
"""Opens the clusters that this process starts to this process, and to no other user of the machine."""
