"""Which experts tokens use together, as graphs: within a layer, and from a layer to the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import networkx as nx

Ids = npt.NDArray[np.int16]
Counts = npt.NDArray[np.int64]


def together(ids: Ids, experts: int) -> Counts:
    """Return ``[L, E, E]``: tokens that chose both experts of a pair; the diagonal is zero.

    Args:
        ids: Choices ``[N, L, k]``.
        experts: E.
    """
    layers, k = ids.shape[1:]
    out = np.zeros((layers, experts, experts), np.int64)
    for layer in range(layers):
        for i in range(k):
            for j in range(i):
                out[layer] += _pairs(ids[:, layer, i], ids[:, layer, j], experts)
    out += out.transpose(0, 2, 1)
    out[:, np.arange(experts), np.arange(experts)] = 0
    return out


def passing(ids: Ids, experts: int) -> Counts:
    """Return ``[L - 1, E, E]``: tokens that chose one expert in a layer and another in the next."""
    layers, k = ids.shape[1:]
    out = np.zeros((max(layers - 1, 0), experts, experts), np.int64)
    for layer in range(layers - 1):
        for i in range(k):
            for j in range(k):
                out[layer] += _pairs(ids[:, layer, i], ids[:, layer + 1, j], experts)
    return out


def _pairs(a: Ids, b: Ids, experts: int) -> Counts:
    flat = a.astype(np.int64) * experts + b
    return np.bincount(flat, minlength=experts * experts).reshape(experts, experts)


def graph_of(weights: Counts) -> nx.Graph:
    """Return the graph of one layer's pairs ``[E, E]``: experts, and edges with a ``weight``."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(len(weights)))
    rows, columns = np.nonzero(np.triu(weights, 1))
    graph.add_weighted_edges_from(
        (int(e), int(f), int(weights[e, f])) for e, f in zip(rows, columns, strict=True)
    )
    return graph


def bisected(graph: nx.Graph, sizes: list[int], seed: int) -> list[list[int]]:
    """Divide a graph into parts of these sizes with few edges between, by Kernighan and Lin, part by part."""
    import networkx as nx

    nodes = sorted(graph)
    if len(sizes) == 1:
        return [nodes]
    half = len(sizes) // 2
    left = sum(sizes[:half])
    order = np.random.default_rng(seed).permutation(nodes).tolist()
    if 0 < left < len(nodes):
        first, second = nx.community.kernighan_lin_bisection(
            graph, (set(order[:left]), set(order[left:])), weight="weight", seed=seed
        )
        if len(first) != left:
            first, second = second, first
    else:
        first, second = set(order[:left]), set(order[left:])
    return bisected(graph.subgraph(first), sizes[:half], seed) + bisected(
        graph.subgraph(second), sizes[half:], seed
    )
