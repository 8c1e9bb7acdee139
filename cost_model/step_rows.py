"""What expert parallelism adds to a rank's compute.

Rows that arrive from other ranks are sorted by expert, and put back into the order of their arrival before they return
(as in `passes.expert_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence

from omnicompile.cost_model.step_chain import expert_exchange_bytes, expert_positions, is_free
from omnicompile.cost_model.step_layout import Groups, Split
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.cost_model.step_price import Prices
from omnicompile.program import Phase

SORT_KERNELS = 6
"""Kernels over one number a row or an expert that find the order: counts, the expert of each row, the sort, its
inverse."""


def with_row_moves(
    ops: Sequence[OpNumbers], seconds: Sequence[float], split: Split, groups: Groups, prices: Prices, chunks: int
) -> list[float]:
    """`seconds` of the operators of one phase, with those of moving rows: before the first product of experts, after
    the last one, and where the rows of `chunks` chunks become one tensor."""
    times, experts = list(seconds), expert_positions(ops)
    if not experts or groups.experts.trivial:
        return times
    first, last = experts[0], max((i for i in experts if not is_free(ops[i])), default=experts[-1])
    if _sorts(ops[first], groups, chunks):
        move = prices.memory(2 * expert_exchange_bytes(ops[first], split))
        times[first] += move
        times[last] += move
        if ops[first].op.phase is Phase.FORWARD:
            times[first] += chunks * SORT_KERNELS * prices.memory(1.0)
    behind = next((i for i in range(last + 1, len(ops)) if not is_free(ops[i])), last)
    times[behind] += joining(ops, split, groups, prices, chunks)
    return times


def joining(ops: Sequence[OpNumbers], split: Split, groups: Groups, prices: Prices, chunks: int) -> float:
    """Seconds to put the rows of chunks of experts into one tensor."""
    experts = expert_positions(ops)
    if chunks == 1 or not experts or groups.experts.trivial:
        return 0.0
    return prices.memory(2 * expert_exchange_bytes(ops[experts[0]], split))


def _sorts(op: OpNumbers, groups: Groups, chunks: int) -> bool:
    """Rows of one expert need not be sorted."""
    assert op.op.experts is not None
    return op.op.experts.experts / groups.experts.size / chunks > 1
