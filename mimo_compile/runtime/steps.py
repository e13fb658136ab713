"""How many tokens each step of a decoder takes."""

from __future__ import annotations

from functools import lru_cache

_PASS_TOKENS = 8
"""A pass over the weights costs about as much as the arithmetic of this many tokens."""


@lru_cache(maxsize=1024)
def plan_steps(count: int, steps: tuple[int, ...], slack: int) -> tuple[int, ...]:
    """Divide tokens among steps of fixed sizes, at the least cost.

    A step of T tokens costs T and the pass over the weights. Only the last step may be longer
    than what is left: it is padded, where that is cheaper.

    Args:
        count: Tokens, 0 or more.
        steps: The sizes there are, ascending from 1.
        slack: How far padding may reach beyond the last token (to the end of the context).

    Returns:
        The sizes of the steps in their order; their sum is `count` or, with padding, more.
    """
    longest = steps[-1]
    whole = max(0, count // longest - 1)
    rest = count - whole * longest
    best: list[tuple[int, int]] = [(0, 0)]  # for so many tokens: cost, first step
    for left in range(1, rest + 1):
        best.append(
            min(
                (_PASS_TOKENS + step + (best[left - step][0] if step <= left else 0), -step)
                for step in steps
                if step - left <= slack
            )
        )
    chosen = [longest] * whole
    while rest > 0:
        step = -best[rest][1]
        chosen.append(step)
        rest -= step
    return tuple(chosen)
