"""Peers by name; adding one is a file and a line here, or a plug-in's entry point."""

from __future__ import annotations

from typing import Any

from mimo_compile.bench.peers.base import Ask, LeftOut, Peer, Variant
from mimo_compile.errors import UsageError
from mimo_compile.plugins import Kind

PEERS: dict[str, Any] = {
    "torch": "pytorch:TorchPeer",
    "onnxruntime": "onnx_runtime:OnnxRuntimePeer",
    "openvino": "openvino:OpenVinoPeer",
    "llama.cpp": "llama_cpp:LlamaCppPeer",
    "torch-compile": "experts:TorchCompile",
    "transformers": "experts:Transformers",
}
"""Name -> where its class lives; modules are imported on use."""

FORMS: dict[str, Any] = {
    "torch-sdpa": "torch_attention:TorchSdpa",
    "torch-sdpa-folded": "torch_attention:TorchSdpaFolded",
    "torch-matmul": "torch_attention:TorchMatmul",
    "torch-flex": "torch_attention:TorchFlex",
}
"""Forms of attention that `torch` stands for all together; each can be asked for alone."""

ALIASES = {"flexattention": "torch-flex", "sdpa": "torch-sdpa"}
"""Other names that people look for."""

_KIND = Kind("peer", "mimo_compile.peers", __name__)


def peer_names() -> list[str]:
    """Return the names of all peers, those of plug-ins last; `FORMS` are not among them."""
    return _KIND.names(PEERS)


def get_peer(name: str) -> Peer:
    """Return a peer; its package need not be installed.

    Raises:
        UsageError: there is none of this name; the known ones are listed.
        EnvironmentMismatch: it is a plug-in's, which cannot be used.
    """
    cls = _KIND.get(name, {**PEERS, **FORMS})
    if missing := [m for m in ("missing", "enter") if not hasattr(cls, m)]:
        raise _KIND.broken(name, f"{cls!r} has no method {missing[0]}", PEERS)
    peer: Peer = cls()
    return peer


def parse_peers(text: str) -> list[str]:
    """Parse ``--peers``: names with commas between, ``all``, or ``none``.

    Raises:
        UsageError: an unknown peer.
    """
    if text == "all":
        return peer_names()
    given = (ALIASES.get(n, n) for n in text.split(",") if n and n != "none")
    names = list(dict.fromkeys(given))
    known = peer_names()
    for name in names:
        if name not in known and name not in FORMS:
            listed = ", ".join([*known, *FORMS])
            raise UsageError(
                f"unknown peer {name!r} (--peers)", remedy=f"use {listed}, all or none"
            )
    return [n for n in names if n not in FORMS or "torch" not in names]


__all__ = [
    "FORMS",
    "PEERS",
    "Ask",
    "LeftOut",
    "Peer",
    "Variant",
    "get_peer",
    "parse_peers",
    "peer_names",
]
