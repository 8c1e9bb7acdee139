"""What a ParallelModule runs: captured, lowered and loaded programs, one for each kind of batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnicompile.errors import LoweringError
from omnicompile.lowering.driver import (
    Lower,
    Targets,
    dtype_named,
    find_targets,
    rank_program,
    with_outputs,
)
from omnicompile.lowering.graph_capture import LOSS_PART, CapturedForward, LoweredInputs, capture_forward
from omnicompile.lowering.host_program import is_host_input
from omnicompile.lowering.step_graph import StepKind
from omnicompile.passes.chunked_loss import has_chunked_loss
from omnicompile.passes.placement import Partial, Replicate, Shard
from omnicompile.passes.rank_program import DATA_AXES, ParamSpec, RankProgram
from omnicompile.plan import LossHead, Plan
from omnicompile.recompute import Recompute
from omnicompile.runtime.agreement import MOST_LOSSES, require_same
from omnicompile.runtime.backends import Backend, Compilations, Function, StepFunction, move_to
from omnicompile.runtime.mesh import RuntimeMesh
from omnicompile.runtime.offload import HostStore, check_backend
from omnicompile.runtime.parameters import ParameterStore
from omnicompile.runtime.state import own_buffers

LABELS = "labels"


@dataclass
class Capture:
    """A captured forward for one kind of batch."""

    forward: CapturedForward
    inputs: LoweredInputs
    targets: Targets | None

    def counts(self, values: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Targets of each loss that is normalised by their number, in the batch that `values` were prepared from."""
        return () if self.targets is None else self.targets.counts(values)


@dataclass(frozen=True)
class StepResult:
    """What a step graph gave. outputs: the forward's. gradients: of local shards, by the model's names. summed: those
    that are summed over replicas. accumulated: gradients of earlier micro-steps are in them."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    summed: frozenset[str]
    accumulated: bool


@dataclass
class LoadedProgram:
    """A lowered forward with its groups bound, on its device. order: placeholders; fixed: those that never change.

    forward: the forward alone. make_step: of forward and backward in one graph, called when a kind of it is first
    needed; None where the backend leaves the backward to autograd. parts: names of the losses that the outputs after
    the first are.
    """

    program: RankProgram
    order: tuple[str, ...]
    fixed: dict[str, Tensor]
    forward: Function
    make_step: Callable[[RankProgram, StepKind], StepFunction] | None = None
    parts: tuple[str, ...] = ()
    _steps: dict[StepKind, StepFunction] = field(default_factory=dict)

    def run(self, values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The forward's outputs. values: by placeholder; params: local shards by the model's names."""
        return self.forward(*self._arguments(values, params))

    def step(
        self,
        values: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        last: bool = False,
        kept: dict[str, Tensor] | None = None,
        shares: bool = False,
    ) -> StepResult | None:
        """Forward and backward; None if there is no step graph.

        last: no micro-step of this optimizer step follows. kept: gradients of those before it, by the model's names.
        shares: every micro-step's loss is its share of the step's, so its gradients may be added to what is kept, which
        is then taken out, written to and given back as part of the sums.
        """
        if self.make_step is None:
            return None
        kept = {} if kept is None else kept
        accumulates = shares and bool(kept) and self._has_all(kept)
        kind = StepKind(accumulates, last and self._sums and (accumulates or not kept))
        if kind not in self._steps:
            self._steps[kind] = self.make_step(self.program, kind)
        step, names = self._steps[kind], self._steps[kind].gradients
        arguments = self._arguments(values, params)
        if accumulates:
            arguments += [kept.pop(self._name(placeholder)) for placeholder in names]
        with torch.no_grad():
            loss, *rest = step.run(*arguments)
        gradients = {self._name(placeholder): gradient for placeholder, gradient in zip(names, rest)}
        summed = frozenset(map(self._name, step.summed))
        return StepResult((loss, *rest[len(names) :]), gradients, summed, accumulates)

    @property
    def _sums(self) -> bool:
        """Whether steps with sums over replicas have graphs of their own."""
        return self.program.overlap.replica_sums and any(spec.reduce_axes for spec in self.program.params.values())

    def _has_all(self, kept: Mapping[str, Tensor]) -> bool:
        """Whether there is one for each gradient that this program has: an earlier micro-step was one of it."""
        earlier = next(iter(self._steps.values()), None)
        return earlier is not None and all(self._name(placeholder) in kept for placeholder in earlier.gradients)

    def _name(self, placeholder: str) -> str:
        return self.program.params[placeholder].name

    def _arguments(self, values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> list[Tensor]:
        specs = self.program.params
        arguments = []
        for name in self.order:
            if name in specs:
                arguments.append(params[specs[name].name])
            else:
                arguments.append(self.fixed[name] if name in self.fixed else values[name])
        return arguments

    @property
    def count_names(self) -> list[str]:
        return [name for name, spec in self.program.inputs.items() if spec.kind == "count"]


def batch_signature(batch: Mapping[str, Any], training: bool) -> str:
    """What decides the graph of a batch: names, dtypes, shapes of float tensors and of token ids, plain values."""
    lines = [f"training {training}"]
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            shape = "" if is_host_input(value) and value.dim() != 2 else str(tuple(value.shape))
            shape = "" if name.endswith("thw") else shape
            lines.append(f"{name} {value.dtype} {shape}")
        else:
            lines.append(f"{name} {value!r}")
    return "\n".join(lines)


class Engine:
    """Captures and lowers `model` for the batches that come, under one plan on one mesh.

    backend: turns bound graphs into what is called. lower: the passes (tests give their own). compilations: counts the
    graphs that were given to a compiler.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        mesh: RuntimeMesh,
        lower: Lower,
        backend: Backend,
        stored: torch.dtype,
        segments: int,
    ) -> None:
        self.model, self.plan, self.mesh = model, plan, mesh
        self._lower, self._backend, self._stored, self._segments = lower, backend, stored, segments
        self.compilations = Compilations()
        self.buffers = own_buffers(model, mesh.device)
        self._captures: dict[str, Capture] = {}
        self._programs: dict[tuple[str, bool], LoadedProgram] = {}
        check_backend(plan, stored, backend.make_step is not None)
        recomputed = sorted(name for name, block in plan.blocks.items() if block.recompute is not Recompute.NONE)
        if recomputed and backend.make_step is None:
            warnings.warn(
                f"the plan recomputes activations of {', '.join(recomputed)}; this backend keeps them all, with equal "
                'results and more memory: use backend="inductor" or "step"',
                stacklevel=3,
            )

    def new_store(self, specs: Mapping[str, ParamSpec]) -> ParameterStore:
        """Where this rank's parameters will be."""
        if self.plan.offload_optimizer:
            return HostStore(self.mesh, specs, dtype_named(self.plan.param_dtype))
        return ParameterStore(self.mesh, specs)

    def capture(self, batch: Mapping[str, Any], signature: str) -> Capture:
        if signature not in self._captures:
            forward, inputs = capture_forward(self.model, batch, self._segments, dtype_named(self.plan.param_dtype))
            if "loss" not in forward.outputs:
                raise LoweringError("the model returned no loss: give it `labels`, or wrap it to return a scalar loss")
            targets = find_targets(forward)
            if targets is not None and len(targets.losses) > MOST_LOSSES:
                raise LoweringError(f"the loss has {len(targets.losses)} parts with targets, more than {MOST_LOSSES}")
            self._captures[signature] = Capture(forward, inputs, targets)
        return self._captures[signature]

    def program(self, batch: Mapping[str, Any], signature: str, logits: bool) -> LoadedProgram:
        """The loaded program for this kind of batch; all ranks must ask for the same one together."""
        key = (signature, logits)
        if key not in self._programs:
            capture = self.capture(batch, signature)
            parts = [name for name in capture.forward.outputs if name.startswith(LOSS_PART)]
            wanted = ("loss", "logits") if logits else ("loss", *parts)
            forward = with_outputs(capture.forward, wanted)
            requires_grad = {n: p.requires_grad for n, p in self.model.named_parameters(remove_duplicate=False)}
            initial = rank_program(forward, self.plan, requires_grad, _lengths(batch), self._stored)
            lowered = self._lower(initial)
            if self.plan.loss_head is LossHead.CHUNKED and not logits and not has_chunked_loss(lowered):
                warnings.warn(f"the plan's chunked loss head is left whole: {'; '.join(lowered.notes)}", stacklevel=2)
            require_same({"lowered graph": lowered.gm.code}, self.mesh.control)
            self._programs[key] = self._load(lowered, forward)
        return self._programs[key]

    def _load(self, lowered: RankProgram, captured: CapturedForward) -> LoadedProgram:
        lowered.bind(self.mesh.names(lowered.groups))
        fixed: dict[str, Tensor] = {}
        for placeholder, spec in lowered.inputs.items():
            if spec.kind == "rank":
                fixed[placeholder] = torch.tensor(self.mesh.coordinate(spec.name), dtype=torch.int64)
            elif spec.kind == "buffer":
                constant = captured.constants.get(placeholder)
                fixed[placeholder] = self.buffers[spec.name] if constant is None else constant
        fixed = {name: value.to(self.mesh.device) for name, value in fixed.items()}
        order = tuple(node.name for node in lowered.gm.graph.find_nodes(op="placeholder"))
        device = self.mesh.device
        forward = self._backend.compile(move_to(lowered.copy().gm, device), self.compilations)
        make_step = None
        if self._backend.make_step is not None:
            make_step = partial(self._backend.make_step, device, self.compilations)
        parts = tuple(name.removeprefix(LOSS_PART) for name in captured.outputs[1:] if name.startswith(LOSS_PART))
        return LoadedProgram(lowered, order, fixed, forward, make_step, parts)

    def whole_output(self, loaded: LoadedProgram, index: int, value: Tensor) -> Tensor:
        """An output of one micro-batch, put together from the sp ranks (a collective over them)."""
        placement, sp = loaded.program.outputs[index], self.mesh.group("sp")
        if isinstance(placement, Replicate) or self.mesh.size("sp") == 1:
            return value
        value = value.contiguous()
        if isinstance(placement, Partial):
            dist.all_reduce(value, group=sp)
            return value
        assert isinstance(placement, Shard)
        parts = [torch.empty_like(value) for _ in range(self.mesh.size("sp"))]
        dist.all_gather(parts, value, group=sp)
        dim, outer = placement.dim, placement.outer
        parts = [part.unflatten(dim, (outer, part.shape[dim] // outer)) for part in parts]
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1)

    def reduce_losses(self, loaded: LoadedProgram, outputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The global loss, and its parts by name, of this rank's outputs of the forward."""
        kept = len(loaded.parts) + 1
        local = [value.detach() for value in outputs[:kept]]
        for i, placement in enumerate(loaded.program.outputs[1:kept], start=1):
            if isinstance(placement, Replicate):  # every rank of the sp group has the whole of it
                local[i] = local[i] / self.mesh.size("sp")
        total = torch.stack([value.to(local[0].dtype) for value in local])
        dist.all_reduce(total, group=self.mesh.group(DATA_AXES))
        loss, *parts = total.unbind()
        return loss.clone(), dict(zip(loaded.parts, parts))


def _lengths(batch: Mapping[str, Any]) -> set[int]:
    """Sizes that count tokens or patches: the last of two-dimensional ids, the first of feature rows."""
    lengths: set[int] = set()
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() == 2:
            lengths.add(value.shape[1] if is_host_input(value) else value.shape[0])
    return {size for size in lengths if size > 3}
