"""Values for a model that was built on the meta device, by its own initialization: a few parameters at a time, so that
no process ever holds the whole model, and the same values however many processes there are.

What initializes a parameter is found by running every initializer once on meta tensors and watching what it touches.
Parameters that one initializer touches together belong to one unit. A unit is made real, filled with NaN, initialized
from a seed of its own, and given away; then the next one is.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omnicompile.errors import InputError
from omnicompile.runtime.adapters import adapter_configs, adapter_initializers, defined_method


def on_meta(model: nn.Module) -> bool:
    return any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))


class Target(Protocol):
    """Takes values of parameters, of each the part that it keeps."""

    def part_of(self, name: str) -> tuple[slice, ...]:
        """The part of the whole tensor that `take` wants."""

    def take(self, name: str, value: Tensor, within: tuple[slice, ...] | None = None) -> None:
        """Keep a copy of the part's value, or of a piece of it. within: where in the part the piece is."""


@dataclass
class _Slots:
    """The places of a model that hold one tensor (several where it is tied). tensor: what they held at first."""

    tensor: Tensor
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def put(self, value: Tensor | None) -> None:
        for holder, leaf in self.places:
            holder[leaf] = value

    @property
    def value(self) -> Tensor:
        holder, leaf = self.places[0]
        return holder[leaf]


@dataclass(frozen=True)
class _Unit:
    """names: of tensors that are initialized together, in the model's order. initializers: in the order they run in."""

    names: tuple[str, ...]
    initializers: tuple[Callable[[], Any], ...]


class InitialValues:
    """The values that a meta model's own initialization gives, from `seed`. The model is not changed."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._seed = seed
        copied = copy.deepcopy(model)
        self._slots = _slots(copied)
        self._units = self._grouped([*_initializers(copied)])
        self._kinds = {name: type(copied.get_submodule(name.rpartition(".")[0])).__name__ for name in self._slots}

    def units(self, wanted: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Whole values by name, those of one unit at a time. Raises InputError naming one that nobody initializes."""
        found = {name for unit in self._units for name in unit.names}
        for name in wanted:
            if name not in found:
                raise InputError(
                    f"{name} of {self._kinds[name]} is on the meta device and its module has no reset_parameters() "
                    "that sets it: give the model weights before parallelize"
                )
        for unit in self._units:
            if names := [name for name in unit.names if name in wanted]:
                yield self._values(unit, names)

    def _values(self, unit: _Unit, names: list[str]) -> dict[str, Tensor]:
        for name in unit.names:
            self._slots[name].put(_unset(self._slots[name].tensor))
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(_derived(self._seed, unit.names[0]))
                for initialize in unit.initializers:
                    initialize()
            values = {name: self._slots[name].value.detach() for name in names}
        finally:
            for name in unit.names:
                self._slots[name].put(self._slots[name].tensor)
        for name, value in values.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise InputError(
                    f"the initialization of {self._kinds[name]} leaves {name} unset: give the model weights before "
                    "parallelize"
                )
        return values

    def _grouped(self, initializers: list[Callable[[], Any]]) -> list[_Unit]:
        names = {id(slots.tensor): name for name, slots in self._slots.items()}
        touched = []
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for initialize in initializers:
                    with _Touched(names) as mode:
                        initialize()
                    touched.append(mode.names)
        except Exception:  # one computes with values, which meta tensors do not have: all at once then
            return [_Unit(tuple(self._slots), tuple(initializers))]
        group = {name: name for name in self._slots}  # each points to another of its group, the first one to itself

        def first(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        for together in touched:
            for name in together[1:]:
                group[first(name)] = first(together[0])
        by_first: dict[str, tuple[list[str], list[Callable[[], Any]]]] = {}
        for name in self._slots:
            by_first.setdefault(first(name), ([], []))[0].append(name)
        for initialize, together in zip(initializers, touched):
            if together:
                by_first[first(together[0])][1].append(initialize)
        return [_Unit(tuple(members), tuple(those)) for members, those in by_first.values() if those]


class _Touched(TorchFunctionMode):
    """Records which of the named tensors are used, or views of them and what is made of them."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._found: dict[str, None] = {}
        self._derived: dict[int, tuple[Tensor, tuple[str, ...]]] = {}  # the tensors too: an id holds while it lives

    @property
    def names(self) -> list[str]:
        return list(self._found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used: dict[str, None] = {}
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                if id(item) in self._names:
                    used[self._names[id(item)]] = None
                elif id(item) in self._derived:
                    used |= dict.fromkeys(self._derived[id(item)][1])
        self._found |= used
        result = func(*args, **(kwargs or {}))
        if used:
            for item in result if isinstance(result, list | tuple) else (result,):
                if isinstance(item, Tensor) and id(item) not in self._names:
                    self._derived[id(item)] = (item, tuple(used))
        return result


def _slots(model: nn.Module) -> dict[str, _Slots]:
    """By the first name of each parameter and buffer, those on the meta device."""
    found: dict[int, tuple[str, _Slots]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                if tensor is not None and tensor.is_meta:
                    name = f"{path}.{leaf}" if path else leaf
                    found.setdefault(id(tensor), (name, _Slots(tensor)))[1].places.append((holder, leaf))
    return dict(found.values())


def _unset(like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else 0
    value = torch.full(like.shape, fill, dtype=like.dtype, device="cpu")
    return nn.Parameter(value, like.requires_grad) if isinstance(like, nn.Parameter) else value


def _derived(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def _initializers(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """In the order that the model's own initialization has: children first. A model of transformers initializes the
    modules below it, adapters of PEFT their own, any other module has `reset_parameters`."""
    from transformers import PreTrainedModel

    seen: set[int] = set()
    configs = adapter_configs(model)

    def walk(module: nn.Module, owner: Any) -> Iterator[Callable[[], Any]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        owner = module if isinstance(module, PreTrainedModel) else owner
        adapters = adapter_initializers(module, configs)
        if adapters is not None:
            seen.update(id(child) for child in module.modules())
            base = module.get_submodule("base_layer")
            seen.difference_update(id(child) for child in base.modules())
            yield from walk(base, owner)
            yield from adapters
            return
        for child in module.children():
            yield from walk(child, owner)
        if owner is not None:
            yield partial(owner._init_weights, module)
        else:
            reset = defined_method(module, "reset_parameters")
            if reset is not None:
                yield partial(reset, module)

    return walk(model, None)


class _WholeModel:
    """A Target that puts whole values into a model."""

    def __init__(self, model: nn.Module) -> None:
        self.slots = _slots(model)

    def part_of(self, name: str) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self.slots[name].tensor.shape)

    def take(self, name: str, value: Tensor, within: tuple[slice, ...] | None = None) -> None:
        slots = self.slots[name]
        if slots.value.is_meta:
            whole = torch.empty(slots.tensor.shape, dtype=slots.tensor.dtype, device="cpu")
            is_parameter = isinstance(slots.tensor, nn.Parameter)
            slots.put(nn.Parameter(whole, slots.tensor.requires_grad) if is_parameter else whole)
        with torch.no_grad():
            slots.value[self.part_of(name) if within is None else within] = value


class Values(Protocol):
    """Where the values of a meta model come from."""

    def fill(self, target: Target, wanted: Collection[str]) -> None:
        """Give `target` its parts of the tensors in `wanted`, under the first names that they have in the model."""

    def described(self) -> str:
        """The same on ranks that have the same values."""


@dataclass(frozen=True)
class Given:
    """Values that are there, by name."""

    tensors: Mapping[str, Tensor]

    def fill(self, target: Target, wanted: Collection[str]) -> None:
        for name in wanted:
            target.take(name, self.tensors[name][target.part_of(name)])

    def described(self) -> str:
        return ""


@dataclass(frozen=True)
class Initialized:
    """Values from the model's own initialization."""

    model: nn.Module
    seed: int

    def fill(self, target: Target, wanted: Collection[str]) -> None:
        for values in InitialValues(self.model, self.seed).units(wanted):
            for name, value in values.items():
                target.take(name, value[target.part_of(name)])

    def described(self) -> str:
        return f"seed {self.seed}"


def with_real_buffers(model: nn.Module, values: Values) -> nn.Module:
    """A copy of a meta model whose buffers have values; parameters stay on the meta device."""
    made = copy.deepcopy(model)
    target = _WholeModel(made)
    values.fill(target, [name for name, slots in target.slots.items() if not isinstance(slots.tensor, nn.Parameter)])
    return made


def materialized(model: nn.Module, values: Values) -> nn.Module:
    """A copy of a meta model in host memory with all its values."""
    made = copy.deepcopy(model)
    target = _WholeModel(made)
    values.fill(target, list(target.slots))
    return made.train(model.training)
