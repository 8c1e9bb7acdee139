"""Checks a lowered forward without the placement rules: by what its values are.

The lowered graph runs on all ranks and the captured one on one, on the same numbers. Every node that both have must
hold, over the ranks of an SP group, the whole value, pieces of it along one dimension, or summands of it; the first
that does not is named. The loss must be the sum over ranks, and every gradient, after the reductions that the program
declares, the captured graph's. All ranks run one graph, so that the order of collectives is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.errors import VerificationError
from omnicompile.passes import collectives, expert_ops
from omnicompile.passes.dropout import replace_dropout_pass
from omnicompile.passes.dropout_op import site_keys
from omnicompile.passes.functional import remove_mutation_pass
from omnicompile.passes.loss import count_values
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import DATA_AXES, GROUP_PREFIX, ParamSpec, RankProgram, axis_size
from omnicompile.passes.simulate import SIMULATED_SEED, Recorder, run_ranks


@dataclass(frozen=True)
class Report:
    """nodes: how many were compared. loss_error: relative. gradient_errors: by parameter, ||difference|| / max(||g||,
    1e-6 * global gradient norm)."""

    nodes: int
    loss_error: float
    gradient_errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.gradient_errors.items(), key=lambda item: item[1], default=("", 0.0))


def check_gradient_axes(program: RankProgram) -> None:
    """Every trained parameter's gradient is summed over every data axis once: by the backward of its gather, by the
    runtime (`reduce_axes`), or because expert rows of the group all met there. Raises VerificationError otherwise."""
    wanted = {axis for axis in DATA_AXES.split(",") if axis_size(program.mesh, axis) > 1}
    for node in program.gm.graph.find_nodes(op="placeholder"):
        spec = program.params.get(node.name)
        if spec is None or not spec.trainable or not node.users:
            continue
        axes = _summed_axes(program, node, spec)
        names = [axis for one in axes for axis in one.split(",")]
        if "ep" in names or "ep_rest" in names:
            complete = "ep" in names and (axis_size(program.mesh, "ep_rest") == 1 or "ep_rest" in names)
            names = [n for n in names if not n.startswith("ep")] + (["dp_shard", "sp"] if complete else [])
        names = [n for n in names if axis_size(program.mesh, n) > 1]
        if sorted(names) != sorted(wanted):
            raise VerificationError(
                f"the gradient of {spec.name} is summed over ({', '.join(sorted(names))}), but must be over "
                f"({', '.join(sorted(wanted))}), each once"
            )


def _summed_axes(program: RankProgram, node: fx.Node, spec: ParamSpec) -> list[str]:
    axes = [*spec.reduce_axes, *(shard.axes for shard in spec.shards if shard.axes == "ep")]
    gathers = {user.args[-1] for user in node.users if user.target is collectives.gather_param}
    direct = [user for user in node.users if user.target is not collectives.gather_param]
    if len(gathers) > 1 or (gathers and direct):
        raise VerificationError(f"the uses of {spec.name} are gathered over different groups")
    stored = {shard.axes for shard in spec.shards if shard.axes != "ep"}
    over = {str(group).removeprefix(GROUP_PREFIX) for group in gathers}
    if stored != over:
        raise VerificationError(
            f"{spec.name} is stored in pieces over {sorted(stored)} but gathered over {sorted(over)}"
        )
    return axes + sorted(over)


def verify_lowering(
    original: RankProgram,
    lowered: RankProgram,
    values: Mapping[str, Tensor],
    targets: float | Sequence[int],
    tolerance: float = 1e-5,
) -> Report:
    """Compare `lowered` with `original`, from which it was made, on `values` (whole, by placeholder of the original).

    Every data rank gets the same micro-batch, of `targets` target tokens (for each loss, where there are several).
    Raises VerificationError naming the first
    node, the loss or the gradient that differs by more than `tolerance` (relative).
    """
    check_gradient_axes(lowered)
    original = remove_mutation_pass(original.copy())  # a value changed in place later would compare wrong
    original = replace_dropout_pass(original)
    loss, want_grads, want = _run_whole(original, values)
    counts = count_values(targets, lowered.mesh.data_ranks)
    try:
        losses, got_grads, held = run_ranks(lowered, lambda name, _: values.get(name, counts.get(name)), one_batch=True)
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise VerificationError(f"the lowered forward does not run: {str(error).splitlines()[0]}") from error
    nodes = _check_nodes(original, lowered, want, held, tolerance)
    loss_error = abs(sum(losses) - loss) / max(abs(loss), 1e-30)
    if loss_error > tolerance:
        raise VerificationError(f"the losses of all ranks add up to {sum(losses):.8g}, but the loss is {loss:.8g}")
    errors = _gradient_errors(want_grads, got_grads)
    report = Report(nodes, loss_error, errors)
    name, worst = report.worst
    if worst > tolerance:
        raise VerificationError(
            f"the gradient of {name} is off by {worst:.1e} (relative): a reduction is missing, doubled or scaled"
        )
    return report


def _run_whole(
    program: RankProgram, values: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients by parameter name, and what every node held."""
    recorder = Recorder(program.copy().gm)
    inputs: dict[str, Tensor] = {}
    for node in program.gm.graph.find_nodes(op="placeholder"):
        spec = program.params.get(node.name)
        value = _value(program, node.name, values).detach().clone()
        inputs[node.name] = value.requires_grad_(spec.trainable) if spec is not None else value
    result = recorder.run(*inputs.values())
    loss = result[0] if isinstance(result, tuple | list) else result
    loss.backward()
    grads = {}
    for name, spec in program.params.items():
        grad = inputs[name].grad
        if grad is not None:
            grads[spec.name] = grad
    held = {n: v.detach() for n, v in recorder.seen.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return float(loss), grads, held


def _value(program: RankProgram, name: str, values: Mapping[str, Tensor]) -> Tensor:
    item = program.inputs.get(name)
    if item is not None and item.kind == "dropout":
        return site_keys(SIMULATED_SEED, int(item.name) + 1)[-1]
    return torch.tensor(0) if item is not None and item.kind == "rank" else values[name]


def _own_order(graph: fx.Graph) -> set[fx.Node]:
    """Nodes between the dispatch and the combination of an expert layer, whose rows each rank has in its own order."""
    start = (expert_ops.dispatch, torch.ops.omnicompile.expert_dispatch.default)
    end = (expert_ops.combine, torch.ops.omnicompile.expert_combine.default)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in start or (node.target not in end and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _after_losses(graph: fx.Graph) -> set[str]:
    """Losses, of which a mean may have become a data rank's share of it, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_loss = node.target is torch.ops.aten.cross_entropy_loss.default
        if node.op == "call_function" and (is_loss or any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return {node.name for node in found}


def _check_nodes(
    original: RankProgram,
    lowered: RankProgram,
    want: Mapping[str, Tensor],
    held: Mapping[str, list[Tensor]],
    tolerance: float,
) -> int:
    skipped = {node.name for node in _own_order(lowered.gm.graph)} | _after_losses(original.gm.graph)
    checked = 0
    for node in original.gm.graph.nodes:
        name = node.name
        if node.op != "call_function" or name not in want or name not in held or name in skipped:
            continue
        checked += 1
        for start in range(0, lowered.mesh.world, lowered.mesh.sp):
            pieces = held[name][start : start + lowered.mesh.sp]
            if not relation(want[name], pieces, tolerance):
                shapes = ", ".join(str(tuple(p.shape)) for p in pieces[:2])
                raise VerificationError(
                    f"{name} in {module_of(node)}: the ranks hold neither the whole value, nor pieces of it, nor "
                    f"summands (whole {tuple(want[name].shape)}; on ranks {shapes})"
                )
    return checked


def relation(whole: Tensor, pieces: list[Tensor], tolerance: float) -> str:
    """How the ranks' pieces make up the whole: "whole", "summands", "cut along d", or "" if they do not."""
    if not whole.numel():
        return "whole"
    if all(p.shape == whole.shape for p in pieces):
        if all(_close(p, whole, whole, tolerance) for p in pieces):
            return "whole"
        if _close(torch.stack([p.double() for p in pieces]).sum(0), whole, whole, tolerance):
            return "summands"
        return ""
    if len({tuple(p.shape) for p in pieces}) > 1 or pieces[0].dim() != whole.dim():
        return ""
    for dim, (size, part) in enumerate(zip(whole.shape, pieces[0].shape)):
        if size == part * len(pieces):
            for outer in range(1, part + 1):
                if part % outer == 0:
                    folded = torch.cat([p.unflatten(dim, (outer, -1)) for p in pieces], dim + 1)
                    if _close(folded.flatten(dim, dim + 1), whole, whole, tolerance):
                        return f"cut along {dim}"
    return ""


def _close(got: Tensor, want: Tensor, scale: Tensor, tolerance: float) -> bool:
    if got.shape != want.shape:
        return False
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    got, want = got.double()[finite], want.double()[finite]
    return bool((got - want).norm() <= tolerance * max(float(want.norm()), 1e-30) + 1e-30)


def _gradient_errors(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, float]:
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    return {
        name: float((got.get(name, torch.zeros_like(g)) - g).norm() / torch.maximum(g.norm(), 1e-6 * norm))
        for name, g in want.items()
    }
