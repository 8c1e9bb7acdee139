"""Where a model's host metadata enters its graph, and how it becomes inputs of the graph.

A model computes position ids, cumulative sequence lengths, window indices, placeholder masks and shifted labels from
its batch on the host, by its own code. `HostMode` runs that code for real. Every host tensor that then meets a traced
operation *crosses* into the graph. Crossings are numbered in the order in which they first happen, so that running the
same code on another batch gives the same list with other values: the list is what the graph takes as inputs.

What else could carry a batch's metadata into the graph is taken out here: the longest segment given to the attention
anchor becomes the sequence length, and features that are split per image only to be joined again stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from omnicompile.capture.host_mode import HostMode, is_host
from omnicompile.lowering.totals import Totals
from omnicompile.torch_compat import FakeTensor, outside_tracing

_ATTENTION = torch.ops.omnicompile.attention
_BOUNDS = slice(4, 6)  # cu_q, cu_k among the arguments of the attention anchor
_SPLITS = frozenset({torch.split, torch.Tensor.split, torch.split_with_sizes})
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})
_COMPARES = frozenset({torch.Tensor.__eq__, torch.Tensor.eq, torch.eq, torch.Tensor.__ne__, torch.Tensor.ne, torch.ne})
_SAME_VALUES = frozenset({torch.Tensor.to, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten})


@dataclass
class Crossing:
    """A host tensor that enters the graph. bounds_only: it is used for nothing but the segment bounds of attention, so
    that it can be lengthened by empty segments. sources: the batch's tensors that it was computed from, as far as they
    are known (numbers taken out of a tensor lose theirs). number: "total" of a count over the batch, "number" of
    another tensor of no dimensions that is computed from it (see `totals`)."""

    value: Tensor
    bounds_only: bool = True
    sources: frozenset[str] = frozenset()
    number: str = ""


@dataclass(frozen=True)
class Call:
    """A traced operation without its tensors' values: what must be the same for every batch."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    static: str

    def __str__(self) -> str:
        return f"{self.name}{list(map(list, self.shapes))} with {self.static}"


@dataclass(frozen=True)
class Result:
    """What a traced operation gave. given: what it was given, layouts of tensors in place of values."""

    given: tuple[Any, ...]
    value: Any


@dataclass
class _Split:
    source: Tensor
    dim: int
    pieces: tuple[Tensor, ...]


class CrossingMode(HostMode):
    """Host mode that records crossings and, when `inputs` is given, puts the k-th of them in place of crossing k.

    calls: the traced operations, up to what is data of the batch. results: what they gave, by their number, but for
    what must be computed each time. known: results of an earlier run on fake tensors: an operation that is given the
    same is not run again, since fake tensors have nothing but their layouts.
    """

    def __init__(self, inputs: Sequence[Tensor] | None = None, known: Mapping[int, Result] | None = None) -> None:
        super().__init__()
        self.results: dict[int, Result] = {}
        self._known = known or {}
        self._sources: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._totals = Totals()
        self.inputs = inputs
        self.crossings: list[Crossing] = []
        self.calls: list[Call] = []
        self._number: dict[int, int] = {}
        self._splits: dict[int, _Split] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def know(self, traced: Tensor, value: Tensor) -> None:
        """Tell the values of a float input. They are read where the model compares it with a number, to find padding:
        the answer is metadata of the batch."""
        self._values[id(traced)] = (traced, value)

    @property
    def known_values(self) -> int:
        """How many traced tensors have known values."""
        return len(self._values)

    def name_sources(self, batch: Mapping[str, Any]) -> None:
        """Tell which tensors are the batch's own."""
        for name, value in batch.items():
            if is_host(value):
                self._sources[id(value)] = (value, frozenset([name]))
                self._totals.given(value)

    def on_host(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Remember what a host tensor was computed from."""
        self._totals.note(func, args, kwargs, result)
        found = [self._sources[id(x)][1] for x in tree_leaves((args, kwargs)) if id(x) in self._sources]
        if found:
            for value in tree_leaves(result):
                if is_host(value) and id(value) not in self._sources:
                    self._sources[id(value)] = (value, frozenset().union(*found))

    def traced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _JOINS and (whole := self._rejoined(args, kwargs)) is not None:
            return whole
        if args and id(args[0]) in self._values and func in _COMPARES | _SAME_VALUES:
            return self._of_known(func, args, kwargs)
        if is_attention(func):
            args = self._with_length_bounds(args)
        sizes = _split_sizes(func, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        call = _call(func, leaves)
        leaves = [self._enter(leaf, func, args) if is_host(leaf) else leaf for leaf in leaves]
        number, given = len(self.calls), (func, spec, *map(_without_values, leaves))
        if sizes is None:
            self.calls.append(call)
            if (known := self._known.get(number)) is not None and known.given == given:
                self.results[number] = known
                return known.value
        args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        if sizes is not None:
            self._remember_split(args, kwargs, result)
        elif len(self.calls) == number + 1 and _reusable(args, result):  # and it calls no other traced operation
            self.results[number] = Result(given, result)
        return result

    def _of_known(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A comparison of a known input with a number, done for real; or the same input in another shape or dtype."""
        with outside_tracing():
            real = func(self._values[id(args[0])][1], *args[1:], **kwargs)
        if func in _COMPARES and isinstance(args[1], int | float) and is_host(real):
            self._totals.given(real)
            return real
        result = func(*args, **kwargs)
        if func in _SAME_VALUES:
            self.calls.append(_call(func, tree_leaves((args, kwargs))))
            self.know(result, real)
        return result

    def _enter(self, tensor: Tensor, func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        if (held := self._totals.least(tensor)) is not None:  # the least value is for the count of all ranks
            count = self._enter(held[0], func, args)
            if self.inputs is None:
                return tensor
            least = torch.clamp(count, min=held[1])  # the mean of integers need not be one
            return least.to(tensor.dtype) if tensor.is_floating_point() else least
        number = self._number.get(id(tensor))
        if number is None:
            number = self._number[id(tensor)] = len(self.crossings)
            known = self._sources.get(id(tensor))
            sources = known[1] if known else frozenset[str]()
            self.crossings.append(Crossing(tensor, sources=sources, number=self._totals.kind(tensor)))
        if not (is_attention(func) and any(tensor is bound for bound in args[_BOUNDS])):
            self.crossings[number].bounds_only = False
        return tensor if self.inputs is None else self.inputs[number]

    def _with_length_bounds(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[4] is None:
            return args
        return (*args[:6], args[0].shape[2], args[1].shape[2], *args[8:])

    def _remember_split(self, args: tuple[Any, ...], kwargs: dict[str, Any], pieces: tuple[Tensor, ...]) -> None:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        split = _Split(args[0], dim % args[0].dim(), tuple(pieces))
        for piece in pieces:
            self._splits[id(piece)] = split

    def _rejoined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The tensor whose pieces, all and in order, are being joined."""
        pieces = args[0] if args else kwargs.get("tensors")
        if not pieces or (split := self._splits.get(id(pieces[0]))) is None:
            return None
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % split.source.dim()
        same = len(pieces) == len(split.pieces) and all(a is b for a, b in zip(pieces, split.pieces))
        return split.source if same and dim == split.dim else None


def _without_values(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf)


def _reusable(args: tuple[Any, ...], result: Any) -> bool:
    """Not an operation in place, nor one whose result is more than shapes."""
    leaves = tree_leaves(result)
    if not leaves or not all(isinstance(leaf, FakeTensor) for leaf in leaves):
        return False
    given = {id(leaf) for leaf in tree_leaves(args)}
    return not any(id(leaf) in given for leaf in leaves)


def is_attention(func: Callable[..., Any]) -> bool:
    return func is _ATTENTION or func is _ATTENTION.default


def _split_sizes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int] | None:
    """The list of sizes of a split into unequal pieces; None for anything else."""
    if func not in _SPLITS:
        return None
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_sizes"))
    return sizes if isinstance(sizes, list | tuple) else None


def _call(func: Callable[..., Any], leaves: list[Any]) -> Call:
    """Shapes of host tensors are left out: they are checked where they cross, and segment bounds may be longer."""
    shapes = tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor) and not is_host(x))
    static = [x for x in leaves if not isinstance(x, Tensor) and (x is None or isinstance(x, int | float | str | bool))]
    name = func.__name__ if hasattr(func, "__name__") else str(func)
    return Call(name, shapes, str(static))
