"""Matrix products and embedding: token dimensions stay cut; weights are whole; a cut contraction gives Partial."""

from __future__ import annotations

from omnicompile.passes.placement import PARTIAL, REPLICATE, Shard, broadcast_dim
from omnicompile.passes.rules.base import Choice, OpCall, Rule, candidate_shards, is_partial


def linear(call: OpCall) -> list[Choice]:
    last = len(call.shape("input")) - 1
    choices = [Choice({"input": shard}, (shard,)) for shard in candidate_shards(call, "input") if shard.dim != last]
    if is_partial(call.placement("input")) and not call.has("bias"):
        choices.append(Choice({"input": PARTIAL}, (PARTIAL,)))
    return choices


def _product(call: OpCall, left: str, right: str) -> list[Choice]:
    """matmul with broadcasting batch dimensions: rows of the left, columns of the right, or a batch dimension cut."""
    a, b, out = call.shape(left), call.shape(right), call.out
    if len(a) < 2 or len(b) < 2:
        return []
    choices = []
    rows, columns = len(out) - 2, len(out) - 1
    for shard in candidate_shards(call, left):
        target = broadcast_dim(shard, len(a), len(out))
        if target.dim == columns:
            if shard.outer == 1 and not shard.ragged:
                choices.append(Choice({left: shard, right: Shard(len(b) - 2)}, (PARTIAL,)))
        elif target.dim == rows:
            choices.append(Choice({left: shard}, (target,)))
        else:
            choices += _batch(call, left, right, target)
    for shard in candidate_shards(call, right):
        target = broadcast_dim(shard, len(b), len(out))
        if target.dim == columns:
            choices.append(Choice({right: shard}, (target,)))
        elif target.dim < rows:
            choices += _batch(call, left, right, target)
    if is_partial(call.placement(left)) != is_partial(call.placement(right)):
        one = left if is_partial(call.placement(left)) else right
        choices.append(Choice({one: PARTIAL}, (PARTIAL,)))
    return choices


def _batch(call: OpCall, left: str, right: str, target: Shard) -> list[Choice]:
    """A batch dimension cut on both sides, or on one where the other has size 1 or lacks it."""
    required = {}
    for name in (left, right):
        shape = call.shape(name)
        own = broadcast_dim(target, len(call.out), len(shape))
        has = own.dim >= 0 and shape[own.dim] == call.out[target.dim]
        required[name] = own if has else REPLICATE
    return [Choice(required, (target,))] if call.fits(call.out, target) else []


def matmul(call: OpCall) -> list[Choice]:
    return _product(call, "self", "other" if "other" in call.values else "mat2")


def addmm(call: OpCall) -> list[Choice]:
    """bias [n] or [1, n] + rows @ weight."""
    rows = call.shape("mat1")
    bias = call.shape("self")
    choices = []
    for shard in candidate_shards(call, "mat1"):
        if shard.dim == 0:
            required = {"mat1": shard}
            if len(bias) == 2 and bias[0] == rows[0]:
                required["self"] = shard
            choices.append(Choice(required, (shard,)))
    return choices


def embedding(call: OpCall) -> list[Choice]:
    return [
        Choice({"indices": shard}, (shard,))
        for shard in candidate_shards(call, "indices")
        if call.fits(call.out, shard)
    ]


def einsum(call: OpCall) -> list[Choice]:
    """Any letter of the output that every operand which has it has in full; a contracted letter gives Partial."""
    equation = call.values["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        return []
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    nodes = [node for _, node in call.tensors()]
    letters: dict[str, Shard] = {}
    for term, node in zip(terms, nodes):
        placement = call.placements[node]
        if isinstance(placement, Shard) and not placement.ragged:
            letters.setdefault(term[placement.dim], placement)
    choices = []
    for letter, shard in letters.items():
        if any(term.count(letter) > 1 for term in terms):
            continue
        required = tuple(Shard(term.index(letter), shard.outer) if letter in term else REPLICATE for term in terms)
        if letter in output:
            target = Shard(output.index(letter), shard.outer)
            if call.fits(call.out, target):
                choices.append(Choice({"tensors": required}, (target,)))
        elif shard.outer == 1:
            choices.append(Choice({"tensors": required}, (PARTIAL,)))
    return choices


RULES: dict[str, Rule] = {
    "aten::linear": linear,
    "aten::matmul": matmul,
    "aten::mm": matmul,
    "aten::bmm": matmul,
    "aten::__matmul__": matmul,
    "aten::addmm": addmm,
    "aten::embedding": embedding,
    "aten::einsum": einsum,
}
