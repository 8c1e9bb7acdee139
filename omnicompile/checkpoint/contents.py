"""The tensors of a module and its optimizer as torch.distributed.checkpoint stores them, and back.

Every parameter and every tensor that the optimizer keeps for it is stored as the part of the whole tensor that this
rank holds (a DTensor), under the parameter's name, so that any other plan or number of ranks can read its own part.
What the optimizer keeps beside tensors is described in the manifest:

    {"class": "AdamW",
     "groups": [{"parameters": [names], "options": {"lr": 0.001, ...}}],
     "state": {name: {"exp_avg": {"kind": "shard", "dtype": "float32"},
                      "step": {"kind": "tensor", "dtype": "float32", "shape": []},
                      "calls": {"kind": "value", "value": 3}}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnicompile.errors import CheckpointError
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.plain_module import PlainModule

Module = ParallelModule | PlainModule
# How an optimizer computes, not what: the present choice holds, not the one that was saved.
_IMPLEMENTATION = frozenset({"capturable", "differentiable", "foreach", "fused"})


def module_tensors(module: Module, left_out: Collection[str]) -> dict[str, Tensor]:
    """By name in the checkpoint; on the module's own memory."""
    kept = {name: value for name, value in module.stored().items() if name not in left_out}
    found = {_parameter_key(name): module.as_whole(name, value) for name, value in kept.items()}
    return found | {_buffer_key(name): value for name, value in module.stored_buffers().items()}


def frozen_sums(module: Module) -> dict[str, int]:
    """Of parameters that are not trained (a collective)."""
    return module.bit_sums([name for name, value in module.stored().items() if not value.requires_grad])


def whole_shapes(module: Module) -> dict[str, list[int]]:
    return {name: list(module.as_whole(name, value).shape) for name, value in module.stored().items()}


def _parameter_key(name: str) -> str:
    return f"model/{name}"


def _buffer_key(name: str) -> str:
    return f"buffer/{name}"


def _state_key(name: str, key: str) -> str:
    return f"optimizer/{key}/{name}"


@dataclass(frozen=True)
class OptimizerContents:
    """tensors: by name in the checkpoint. facts: for the manifest."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @staticmethod
    def of(module: Module, optimizer: torch.optim.Optimizer) -> OptimizerContents:
        """Raises CheckpointError for what cannot be stored."""
        names = _names(module, optimizer)
        saved = optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] = {}
        for index, values in saved["state"].items():
            name = names[index]
            state[name] = {key: _described(module, name, key, value) for key, value in values.items()}
            for key, value in values.items():
                kind = state[name][key]["kind"]
                if kind != "value":
                    tensors[_state_key(name, key)] = module.as_whole(name, value) if kind == "shard" else value
        groups = [
            {"parameters": [names[index] for index in group["params"]], "options": _options(group)}
            for group in saved["param_groups"]
        ]
        return OptimizerContents(tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state})


def _names(module: Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimizer's parameters, in the order in which its state dict numbers them."""
    known = {id(parameter): name for name, parameter in module.stored().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in known for parameter in parameters):
        raise CheckpointError("the optimizer has parameters that are not the module's: make it of module.parameters()")
    return [known[id(parameter)] for parameter in parameters]


def _described(module: Module, name: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"kind": "value", "value": _plain(value, f"the optimizer's state {key!r} of {name}")}
    dtype = str(value.dtype).removeprefix("torch.")
    local = module.stored()[name]
    if value.shape == local.shape:
        return {"kind": "shard", "dtype": dtype}
    if value.dim() > 0 and module.as_whole(name, local).shape != local.shape:
        raise CheckpointError(
            f"the optimizer's state {key!r} of {name} has shape {list(value.shape)}, neither a single number nor the "
            f"{list(local.shape)} of the parameter's shard: it cannot be stored for another number of ranks"
        )
    return {"kind": "tensor", "dtype": dtype, "shape": list(value.shape)}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {key: _plain(value, f"the optimizer's option {key!r}") for key, value in options.items()}


def _plain(value: Any, what: str) -> Any:
    """As JSON keeps it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise CheckpointError(f"{what} is a {type(value).__name__}, which a checkpoint cannot hold") from None


@dataclass(frozen=True)
class OptimizerTargets:
    """Empty state that a checkpoint is read into. tensors: by name in the checkpoint. apply: hands the state over."""

    tensors: dict[str, Tensor]
    apply: Callable[[], None]

    @staticmethod
    def of(module: Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> OptimizerTargets:
        """Raises CheckpointError if the optimizer is of another class or other parameters than the saved one."""
        names = _names(module, optimizer)
        _require_same_optimizer(optimizer, names, facts)
        index = {name: number for number, name in enumerate(names)}
        tensors: dict[str, Tensor] = {}
        state: dict[int, dict[str, Any]] = {}
        for name, described in facts["state"].items():
            values = {key: _empty(module, name, fact) for key, fact in described.items()}
            state[index[name]] = values
            for key, fact in described.items():
                if fact["kind"] != "value":
                    whole = module.as_whole(name, values[key]) if fact["kind"] == "shard" else values[key]
                    tensors[_state_key(name, key)] = whole

        def apply() -> None:
            groups = optimizer.state_dict()["param_groups"]
            for group, saved in zip(groups, facts["groups"]):
                group.update(_restored(group, saved["options"]))
            optimizer.load_state_dict({"state": state, "param_groups": groups})

        return OptimizerTargets(tensors, apply)


def _empty(module: Module, name: str, fact: Mapping[str, Any]) -> Any:
    if fact["kind"] == "value":
        return fact["value"]
    dtype = vars(torch)[fact["dtype"]]
    if fact["kind"] == "shard":
        return torch.zeros_like(module.stored()[name], dtype=dtype, requires_grad=False)  # padding stays zero
    return torch.zeros(fact["shape"], dtype=dtype)


def _require_same_optimizer(optimizer: torch.optim.Optimizer, names: list[str], facts: Mapping[str, Any]) -> None:
    if type(optimizer).__name__ != facts["class"]:
        raise CheckpointError(f"the checkpoint is of a {facts['class']} optimizer, this is {type(optimizer).__name__}")
    saved = [group["parameters"] for group in facts["groups"]]
    own, rest = [], list(names)
    for group in optimizer.param_groups:
        own.append(rest[: len(group["params"])])
        rest = rest[len(group["params"]) :]
    if len(own) != len(saved):
        raise CheckpointError(f"the checkpoint's optimizer has {len(saved)} parameter groups, this one {len(own)}")
    for number, (ours, theirs) in enumerate(zip(own, saved)):
        if differ := sorted(set(ours) ^ set(theirs)):
            where = "the checkpoint" if differ[0] in theirs else "this optimizer"
            raise CheckpointError(
                f"group {number} of the optimizer differs: only {where} trains {differ[0]} ({len(differ)} differ): "
                "freeze and group the same parameters"
            )


def _restored(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options in the types of the present ones, of those that it has."""
    found: dict[str, Any] = {}
    for key, value in saved.items():
        if key not in group or key in _IMPLEMENTATION:
            continue
        current = group[key]
        if isinstance(current, Tensor):
            found[key] = torch.full_like(current, value)
        else:
            found[key] = tuple(value) if isinstance(current, tuple) else value
    return found
