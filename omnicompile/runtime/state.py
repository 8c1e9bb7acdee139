"""`state_dict` and `load_state_dict` with the keys of the plain model: every name of a tied parameter, parameters that
the forward does not use, and persistent buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omnicompile.errors import InputError
from omnicompile.passes.rank_program import ParamSpec
from omnicompile.runtime.parameters import ParameterStore


def specs_of_all(model: nn.Module, used: Mapping[str, ParamSpec], stored: torch.dtype) -> dict[str, ParamSpec]:
    """By name and in the model's order: the specs of parameters in the graph, and whole ones of all others.

    used: by placeholder. stored: dtype of the master weights.
    """
    planned = {spec.name: spec for spec in used.values()}
    specs = {}
    for name, value in model.named_parameters():
        dtype = stored if value.is_floating_point() else value.dtype
        specs[name] = planned.get(name) or ParamSpec(name, tuple(value.shape), value.requires_grad, dtype)
    return specs


def own_buffers(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Copies on `device` by every name; buffers that go by several names stay one."""
    copies: dict[int, Tensor] = {}
    found = {}
    for name, value in model.named_buffers(remove_duplicate=False):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to(device, copy=True)
        found[name] = copies[id(value)]
    return found


@dataclass(frozen=True)
class State:
    """store: the parameters. buffers: by name, those that the running graphs read. keys: of the plain model's state
    dict -> the name that the value is stored under."""

    store: ParameterStore
    buffers: Mapping[str, Tensor]
    keys: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, store: ParameterStore, buffers: Mapping[str, Tensor]) -> State:
        first = {id(value): name for name, value in model.named_parameters()}
        names = {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}
        return State(store, buffers, {key: names.get(key, key) for key in model.state_dict()})

    def state_dict(self) -> dict[str, Any]:
        """Whole-shape DTensors over the local shards, plain tensors where nothing is cut; a tied parameter's names all
        have the same one."""
        values = {name: value.detach() for name, value in self.buffers.items()} | self.store.state_dict()
        return {key: values[name] for key, name in self.keys.items() if name in values}

    def persistent_buffers(self) -> dict[str, Tensor]:
        """Those that the state dict has, each under one name."""
        names = {name for key, name in self.keys.items() if name in self.buffers}
        found: dict[int, tuple[str, Tensor]] = {}
        for name in sorted(names):
            found.setdefault(id(self.buffers[name]), (name, self.buffers[name]))
        return dict(found.values())

    def load(self, state: Mapping[str, Any], strict: bool) -> tuple[list[str], list[str]]:
        """Copy whole tensors or DTensors by the plain model's keys; of a tied parameter one name is enough, and two
        must be equal. Returns missing and unexpected keys. Raises InputError naming what does not fit."""
        given = {self.keys[key] for key in state if key in self.keys}
        missing = [key for key, name in self.keys.items() if name not in given]
        unexpected = [key for key in state if key not in self.keys]
        if strict and (missing or unexpected):
            raise InputError(
                f"state dict does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]} "
                f"({len(missing)} and {len(unexpected)} keys): give the model's own names, or strict=False"
            )
        loaded: dict[str, str] = {}
        for key, name in self.keys.items():
            if key not in state:
                continue
            if name in loaded:
                _require_tied(loaded[name], state[loaded[name]], key, state[key])
            elif name in self.buffers:
                _copy(key, self.buffers[name], state[key])
            else:
                self.store.load_one(name, state[key])
            loaded[name] = key
        return missing, unexpected


def _copy(key: str, target: Tensor, value: Tensor) -> None:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    if full.shape != target.shape:
        raise InputError(f"state dict has {key} of shape {list(full.shape)}, the model {list(target.shape)}")
    target.copy_(full)


def _require_tied(first: str, one: Tensor, second: str, two: Tensor) -> None:
    """Values under two names of one parameter."""
    if one is two or one.data_ptr() == two.data_ptr():
        return
    if isinstance(one, DTensor) or isinstance(two, DTensor):
        one, two = (v.to_local() if isinstance(v, DTensor) else v for v in (one, two))
    if one.shape != two.shape or not torch.equal(one, two.to(one.device)):
        raise InputError(f"state dict has different values for {first} and {second}, which the model ties together")
