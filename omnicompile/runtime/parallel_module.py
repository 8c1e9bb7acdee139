"""The module that `parallelize` returns: the model, distributed, under the ordinary training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.lowering.host_program import is_host_input
from omnicompile.passes.loss import count_values
from omnicompile.passes.rank_program import ParamSpec
from omnicompile.runtime.agreement import step_agreement
from omnicompile.runtime.budget import Budget
from omnicompile.runtime.dropout_keys import ForwardSeed
from omnicompile.runtime.engine import LABELS, Engine, LoadedProgram, batch_signature
from omnicompile.runtime.packing import dealt_values
from omnicompile.runtime.parameters import ParameterStore, add_parameter, clip_grad_norm
from omnicompile.runtime.state import State
from omnicompile.runtime.targets import TargetCount
from omnicompile.runtime.weights import Values


@dataclass
class Window:
    """The accumulation window that a forward belongs to. last: gradients are reduced over replicas after this one.
    targets: targets of each loss in the whole window over all ranks; None: those of this micro-step."""

    last: bool = True
    targets: tuple[int, ...] | None = None


class Output:
    """loss: the loss of the global batch, equal on all ranks; its backward gives every gradient. losses: its summands
    by name, before their weights, where the model reports them (`losses` in its output), without gradient. logits: of
    this rank's micro-batch, computed when asked for (all ranks must ask together), without gradient."""

    def __init__(self, loss: Tensor, losses: Mapping[str, Tensor], logits: Any) -> None:
        self.loss = loss
        self.losses = dict(losses)
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        return self._logits()

    def __getitem__(self, key: str | int) -> Tensor:
        if key in ("loss", 0):
            return self.loss
        if key in ("logits", 1):
            return self.logits
        raise KeyError(key)


@dataclass
class _Call:
    """One forward: the program, its inputs on the device, and the parts of the loss that it gave."""

    module: ParallelModule
    loaded: LoadedProgram
    values: dict[str, Tensor]
    window: Window
    losses: dict[str, Tensor] = field(default_factory=dict)
    summed: frozenset[str] = frozenset()  # parameters whose gradients the step has summed over replicas
    accumulated: bool = False  # gradients of earlier micro-steps are in those of this one


class _Step(torch.autograd.Function):
    """The forward of one rank's program; the backward gives gradients of the local shards."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *params: Tensor) -> Tensor:
        shards = {name: value.detach() for name, value in call.module.store.weights().items()}
        ctx.call, ctx.local, ctx.leaves, ctx.grads = call, None, (), None
        window = call.window
        done = call.loaded.step(call.values, shards, window.last, call.module._pending, window.targets is not None)
        if done is None:
            leaves = {name: p.requires_grad_(q.requires_grad) for (name, p), q in zip(shards.items(), params)}
            with torch.enable_grad():
                outputs = call.loaded.run(call.values, leaves)
            ctx.local, ctx.leaves = outputs[0], tuple(leaves.values())
        else:
            outputs, ctx.grads = done.outputs, done.gradients
            call.summed, call.accumulated = done.summed, done.accumulated
        loss, call.losses = call.module.engine.reduce_losses(call.loaded, outputs)
        return loss

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        module: ParallelModule = ctx.call.module
        if ctx.grads is None and ctx.local is None:
            raise RuntimeError("backward a second time: the graph's tensors have been freed")
        with module._watch.guard("the backward"):
            if ctx.call.window.targets is not None:
                module.check_scale(seed, ctx.call)
            complete = module.reduce_gradients(_gradients(ctx, seed), ctx.call.window, ctx.call.summed)
            return None, *module.store.give_out(complete)


def _gradients(ctx: Any, seed: Tensor) -> list[Tensor | None]:
    """Of every local shard, before any sum that the program leaves to the runtime; frees what they are made of."""
    store: ParameterStore = ctx.call.module.store
    if ctx.grads is None:
        trained = {name: leaf for name, leaf in zip(store.local, ctx.leaves) if leaf.requires_grad}
        found = torch.autograd.grad(ctx.local, list(trained.values()), seed.to(ctx.local.dtype), allow_unused=True)
        grads: dict[str, Tensor | None] = dict(zip(trained, found))
    elif ctx.call.accumulated:  # the seed is 1
        grads = ctx.grads
    else:
        grads = {name: grad.mul_(seed.to(grad.dtype)) for name, grad in ctx.grads.items()}
    ctx.local = ctx.grads = None
    return [grads.get(name) for name in store.local]


class ParallelModule(nn.Module):
    """The model under a plan. Parameters are this rank's shards, under the model's own names.

    Every rank calls it with its own micro-batch; ranks of one sp group with the same one. The loss is that of the
    global batch, normalised by its target tokens.
    """

    def __init__(self, engine: Engine, specs: Mapping[str, ParamSpec], values: Values, budget: Budget) -> None:
        super().__init__()
        self.engine = engine
        self.budget = budget
        self.store = engine.new_store(specs)
        self.store.fill(values)
        for name, parameter in self.store.local.items():
            add_parameter(self, name, parameter)
        self._watch = engine.mesh.watch
        self._state = State.of(engine.model, self.store, engine.buffers)
        self._window = Window()
        self._pending: dict[str, Tensor] = {}  # gradients of the window's micro-steps so far
        self._scales: list[Tensor] = []  # of losses whose gradients were added up in the step

    @property
    def compilations(self) -> int:
        """Graphs given to a compiler so far. From three layers on their number does not grow with the depth."""
        return self.engine.compilations.count

    def forward(self, **batch: Any) -> Output:
        batch = self._with_labels(batch)
        params = list(self.store.local.values())
        seed = ForwardSeed(self.engine.mesh.control)
        with self._watch.guard("the forward", step=True):
            loaded, values = self._prepare(batch, False, seed)
            if torch.is_grad_enabled():
                call = _Call(self, loaded, values, self._window)
                loss, losses = _Step.apply(call, *params), call.losses
            else:
                loss, losses = self.engine.reduce_losses(loaded, loaded.run(values, self.store.weights()))
        versions = sum(p._version for p in params)
        return Output(loss, losses, lambda: self._logits(batch, versions, seed))

    def _with_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch.get(LABELS) is None and "input_ids" in batch and not torch.is_grad_enabled():
            return batch | {LABELS: batch["input_ids"]}
        return batch

    def _prepare(
        self, batch: Mapping[str, Any], logits: bool, seed: ForwardSeed
    ) -> tuple[LoadedProgram, dict[str, Tensor]]:
        """The program for this batch and its inputs, after all ranks have agreed on them."""
        engine = self.engine
        counts: tuple[int, ...] = ()
        values, dealt, error, signature = {}, {}, None, ""
        try:
            filled = self.budget.fill(to_host(batch))
            batch = filled.batch
            signature = batch_signature(batch, self.training)
            capture = engine.capture(batch, signature)
            values = capture.inputs.prepare(batch)
            if filled.dealing is not None:
                dealt = capture.inputs.prepare(self.budget.dealt(filled))
            counts = capture.counts(values)
        except Exception as failure:
            error = failure
        totals = step_agreement(counts, signature, error, engine.mesh.control)
        loaded = engine.program(batch, signature, logits)
        if filled.dealing is not None:
            values |= dealt_values(loaded.program, filled.dealing, dealt)
        values = {name: value.to(engine.mesh.device, non_blocking=True) for name, value in values.items()}
        targets = self._window.targets
        if targets is None:
            targets = tuple(total // engine.mesh.mesh.sp for total in totals)
        elif counts and len(targets) != len(counts):
            raise InputError(
                f"the loss has {len(counts)} parts with targets of their own, but `targets` counts {len(targets)}: "
                "give what count_targets returns"
            )
        known = count_values(targets)
        for name in loaded.count_names:
            values[name] = known[name].to(engine.mesh.device)
        return loaded, values | seed.keys(loaded.program, engine.mesh.device)

    def _logits(self, batch: Mapping[str, Any], versions: int, seed: ForwardSeed) -> Tensor:
        if sum(p._version for p in self.store.local.values()) != versions:
            raise InputError("logits are computed when asked for, and the parameters have changed since this forward")
        with torch.no_grad(), self._watch.guard("the logits"):
            loaded, values = self._prepare(batch, True, seed)
            return self.engine.whole_output(loaded, 1, loaded.run(values, self.store.weights())[1])

    def count_targets(self, batches: Sequence[Mapping[str, Any]]) -> TargetCount:
        """Target tokens of these micro-batches over all ranks: `targets` of an accumulation window (a collective)."""
        counts: tuple[int, ...] = ()
        error = None
        try:
            counts = tuple(map(sum, zip(*map(self._count_targets, batches))))
        except Exception as failure:
            error = failure
        mesh = self.engine.mesh
        with self._watch.guard("count_targets"):
            totals = step_agreement(counts, "", error, mesh.control)
        return TargetCount([total // mesh.mesh.sp for total in totals])

    def _count_targets(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        batch = self.budget.fill(to_host(given)).batch
        capture = self.engine.capture(batch, batch_signature(batch, self.training))
        return capture.counts(capture.inputs.prepare(batch))

    @contextlib.contextmanager
    def accumulate(self, last: bool, targets: int | None = None) -> Iterator[None]:
        """Forwards inside are one micro-step of an accumulation window, `last` the one before the optimizer's step.

        targets: `count_targets` of the window; every micro-step's loss is then its share of the window's, and the sum
        of their gradients is the window's. Without it scale the losses as with any module.
        """
        before = self._window
        counted = targets.by_loss if isinstance(targets, TargetCount) else None if targets is None else (targets,)
        self._window = Window(last, counted)
        try:
            yield
        finally:
            self._window = before

    def check_scale(self, seed: Tensor, call: _Call) -> None:
        """Losses of a window with `targets` are not to be scaled where gradients are added up in the graph. Looked at
        in the last micro-step, before any gradient is given out: to read it a GPU's host waits for the device."""
        if call.accumulated:
            self._scales.append(seed)
        if call.window.last and self._scales:
            scales, self._scales = torch.stack(self._scales), []
            if bool((scales != 1).any()):
                raise InputError(
                    "a micro-step's loss was scaled before backward(), but `targets` makes each its share of the "
                    "window's loss already: call output.loss.backward(), or accumulate without `targets`"
                )

    def reduce_gradients(
        self, grads: list[Tensor | None], window: Window, summed: frozenset[str] = frozenset()
    ) -> list[Tensor | None]:
        """Sum gradients over the ranks that hold the same shard; before the last micro-step they are kept instead.
        summed: parameters of which the step's graph has done it, micro-steps before it included."""
        if not summed.isdisjoint(self._pending):
            raise InputError(
                "a forward of the last micro-step ran before the backward of an earlier one: call backward() of each "
                "micro-step before the next forward, or plan with overlap.replica_sums off"
            )
        result: list[Tensor | None] = []
        wanted: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
        for (name, spec), grad in zip(self.store.specs.items(), grads):
            kept = self._pending.pop(name, None)
            total = grad if kept is None else kept if grad is None else kept + grad
            if total is not None and not window.last:
                self._pending[name] = total
            elif total is not None and spec.reduce_axes and name not in summed:
                total = total.contiguous()
                wanted.setdefault((spec.reduce_axes, total.dtype), []).append(total)
            result.append(total if window.last else None)
        for (axes, _), tensors in wanted.items():
            self._all_reduce(axes, tensors)
        if not window.last:
            separate(self._pending)
        return result

    def _all_reduce(self, axes: tuple[str, ...], tensors: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        for name in axes:
            dist.all_reduce(flat, group=self.engine.mesh.group(name))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, over the parameters of all ranks. Returns the norm before clipping."""
        with self._watch.guard("clip_grad_norm_"):
            return clip_grad_norm(self.store, max_norm)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Whole-shape DTensors, with the keys of the plain model's state dict."""
        return self._state.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Values as `state_dict` gives them, or whole tensors, the plain model's state dict for instance."""
        with self._watch.guard("load_state_dict"):
            missing, unexpected = self._state.load(state_dict, strict)
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    @property
    def plain_model(self) -> nn.Module:
        """The model that this one runs, its parameters possibly without values."""
        return self.engine.model

    def stored(self) -> dict[str, Tensor]:
        """The parameters as this rank stores them: local shards, zero-padded where a dimension is uneven, by name."""
        return dict(self.store.local)

    def stored_buffers(self) -> dict[str, Tensor]:
        """Buffers of the state dict, each under one name."""
        return self._state.persistent_buffers()

    def as_whole(self, name: str, local: Tensor) -> Tensor:
        """A tensor of the shape of the stored shard of parameter `name` (a moment, say) as part of the whole one: a
        DTensor on the same memory without padding; `local` itself where nothing is cut."""
        return self.store.as_dtensor(name, local.detach())

    def bit_sums(self, names: Sequence[str]) -> dict[str, int]:
        """A number for the value of each parameter, the same under every plan (a collective)."""
        return self.store.bit_sums(names)

    def full_gradient(self, name: str) -> Tensor | None:
        """The whole gradient of a parameter on every rank (a collective); for checks at small sizes."""
        grad = self.store.local[name].grad
        return None if grad is None else self.store.full(name, grad)


def separate(kept: dict[str, Tensor]) -> None:
    """Give each of these memory of its own, in which it can be added to: what has none (the gradient of two parameters,
    a number that stands for many) is copied."""
    seen: set[int] = set()
    for name, value in kept.items():
        if value.data_ptr() in seen or not is_dense(value):
            kept[name] = value.clone(memory_format=torch.contiguous_format)
        seen.add(kept[name].data_ptr())


def is_dense(value: Tensor) -> bool:
    """Whether every element has its own place, without gaps."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(value))


def to_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a batch is computed with on the host."""
    return {k: v.cpu() if is_host_input(v) else v for k, v in batch.items()}
