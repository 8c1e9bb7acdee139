"""Checks a lowered forward without the placement rules: by what its values are.

The lowered graph runs on all ranks and the captured one on one, on the same numbers. Every node that both have must
hold, over the ranks of an SP group, the whole value, pieces of it along one dimension, or summands of it; the first
that does not is named. The loss must be the sum over ranks, and every gradient, after the reductions that the program
declares, the captured graph's; the node at which one goes wrong is named too (placement_checks.py). All ranks run one
graph, so that the order of collectives is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.errors import VerificationError
from omnicompile.passes import collectives
from omnicompile.passes.dropout import replace_dropout_pass
from omnicompile.passes.dropout_op import site_keys
from omnicompile.passes.functional import remove_mutation_pass
from omnicompile.passes.loss import count_values, is_sum_loss
from omnicompile.passes.placement_checks import PlacementChecks, WholeRun
from omnicompile.passes.rank_program import DATA_AXES, GROUP_PREFIX, ParamSpec, RankProgram, axis_size
from omnicompile.passes.simulate import SIMULATED_SEED, Recorder, run_recorded


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
    Raises VerificationError where a value before the losses, the loss or a gradient differs by more than `tolerance`
    (relative). It names the first wrong node: of values that from the inputs on, of gradients that from the loss on.
    """
    check_gradient_axes(lowered)
    original = remove_mutation_pass(original.copy())  # a value changed in place later would compare wrong
    original = replace_dropout_pass(original)
    want = _run_whole(original, values, lowered.mesh.data_ranks)
    counts = count_values(targets, lowered.mesh.data_ranks)
    try:
        got = run_recorded(lowered, lambda name, _: values.get(name, counts.get(name)), one_batch=True)
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise VerificationError(f"the lowered forward does not run: {str(error).splitlines()[0]}") from error
    own = tuple(float(count) / lowered.mesh.data_ranks for count in counts.values())
    checks = PlacementChecks(original, lowered, want, got, own, tolerance)
    nodes = checks.check_values()
    total = sum(got.losses)
    loss_error = abs(total - want.loss) / max(abs(want.loss), 1e-30)
    if loss_error > tolerance:
        where = f"{found}: " if (found := checks.wrong_loss()) else ""
        raise VerificationError(
            f"{where}the losses of all ranks add up to {total:.8g}, but the loss is {want.loss:.8g}"
        )
    report = Report(nodes, loss_error, _gradient_errors(want.gradients, got.gradients))
    name, worst = report.worst
    if worst > tolerance:
        where = f" {found}" if (found := checks.wrong_gradient()) else ""
        raise VerificationError(
            f"the gradient of {name} is off by {worst:.1e} (relative): a reduction is missing, doubled or scaled{where}"
        )
    return report


def _run_whole(program: RankProgram, values: Mapping[str, Tensor], copies: int) -> WholeRun:
    """On `copies` micro-batches, all the same: they only make a cross-entropy that is a sum larger."""
    program = program.copy()
    for node in [node for node in program.gm.graph.nodes if is_sum_loss(node)]:
        with program.gm.graph.inserting_after(node):
            all_copies = program.gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, copies))
        node.replace_all_uses_with(all_copies, delete_user_cb=lambda user, new=all_copies: user is not new)
    program.gm.recompile()
    recorder = Recorder(program.gm)
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
    return WholeRun(float(loss.detach()), grads, held, recorder.gradients())


def _value(program: RankProgram, name: str, values: Mapping[str, Tensor]) -> Tensor:
    item = program.inputs.get(name)
    if item is not None and item.kind == "dropout":
        return site_keys(SIMULATED_SEED, int(item.name) + 1)[-1]
    return torch.tensor(0) if item is not None and item.kind == "rank" else values[name]


def _gradient_errors(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, float]:
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    return {
        name: float((got.get(name, torch.zeros_like(g)) - g).norm() / torch.maximum(g.norm(), 1e-6 * norm))
        for name, g in want.items()
    }
