"""Trace each kind of repeated layer once.

The model's own loop runs at full depth, but a call of a layer whose structure, static arguments and input metadata were
seen before is recorded as one `omnicompile::repeated_layer` node and not traced again. Kinds are found by structure,
never by name: full and windowed attention, dense and mixture-of-experts layers are different kinds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from omnicompile.anchors import markers as _markers  # noqa: F401  (defines the operator)
from omnicompile.capture.host_mode import is_host
from omnicompile.torch_compat import outside_tracing


@dataclass
class LayerKind:
    """A layer traced once. `path` is the instance that was traced; `paths` all calls seen, in order."""

    index: int
    path: str
    paths: list[str] = field(default_factory=list)
    out_leaves: list[Any] = field(default_factory=list)
    out_spec: TreeSpec | None = None


@dataclass(frozen=True)
class LayerCall:
    """A call of the layer at `path`, inside a traced layer of kind `parent` or outside any."""

    path: str
    kind: int
    parent: int | None


@dataclass
class Repeats:
    """What was found while tracing. `calls`: every layer call, in order, inside traced layers too. `alike`: paths of
    layers of the structure of one before them, most of which are not traced."""

    kinds: list[LayerKind] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    alike: frozenset[str] = frozenset()

    def executions(self, kind: int) -> int:
        """How often layers of a kind run in one forward, calls inside repeated outer layers counted."""
        inside = [call for call in self.calls if call.kind == kind]
        return sum(1 if call.parent is None else self.executions(call.parent) for call in inside)


def layer_candidates(model: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """path -> (module, position, list number) of every element of a list that holds two or more of its type."""
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for number, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module.named_children())
        types = [type(child) for _, child in children]
        for position, (child_name, child) in enumerate(children):
            if types.count(type(child)) > 1 and next(child.children(), None) is not None:
                path = f"{name}.{child_name}" if name else child_name
                found[path] = (child, position, number)
    return found


def _scalar_attributes(module: nn.Module, position: int) -> list[tuple[str, str]]:
    """Plain attributes of a layer and all its submodules, integers written relative to the layer's position as well."""
    result = []
    for name, sub in module.named_modules():
        for key, value in sub.__dict__.items():
            if key.startswith("_") or key == "forward":
                continue
            if isinstance(value, bool | float | str | type(None)) or (
                isinstance(value, int | tuple | list) and not isinstance(value, bool)
            ):
                result.append((f"{name}.{key}", repr(value)))
    return result


def structure_keys(candidates: dict[str, tuple[nn.Module, int, int]]) -> dict[str, str]:
    """A digest per layer of its module tree, its parameters (shapes, whether trained) and plain attributes.

    An integer attribute that counts up with the position in its list (a `layer_idx`) says nothing about structure and
    is left out: it takes a different value in every member of the list.
    """
    shapes: dict[str, str] = {}
    attributes: dict[str, dict[str, str]] = {}
    members: dict[int, list[str]] = {}
    for path, (module, position, number) in candidates.items():
        tree = [(n, type(m).__qualname__, m.training) for n, m in module.named_modules()]
        tensors = [(n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in module.named_parameters()]
        buffers = [(n, tuple(t.shape)) for n, t in module.named_buffers()]
        shapes[path] = repr((tree, tensors, buffers))
        attributes[path] = dict(_scalar_attributes(module, position))
        members.setdefault(number, []).append(path)
    counters: dict[int, set[str]] = {}
    for number, paths in members.items():
        names = set().union(*(attributes[p] for p in paths))
        counters[number] = {n for n in names if _counts_up([(candidates[p][1], attributes[p].get(n)) for p in paths])}
    keys = {}
    for path, (_, _, number) in candidates.items():
        kept = sorted((n, v) for n, v in attributes[path].items() if n not in counters[number])
        keys[path] = hashlib.sha256((shapes[path] + repr(kept)).encode()).hexdigest()
    return keys


def _counts_up(values: list[tuple[int, str | None]]) -> bool:
    """True if the attribute is an integer equal to the position plus a constant wherever it is present."""
    offsets = set()
    for position, text in values:
        if text is None:
            continue
        if not text.lstrip("-").isdigit():
            return False
        offsets.add(int(text) - position)
    return len(offsets) == 1


def _argument_key(leaves: list[Any], spec: TreeSpec) -> str:
    """Shapes and types of tensors, the content of host tensors, the value of everything else."""
    parts: list[str] = [str(spec)]
    for leaf in leaves:
        if is_host(leaf):
            with outside_tracing():
                raw = leaf.contiguous().view(torch.uint8) if leaf.numel() and leaf.dim() else leaf.float()
                parts.append(hashlib.sha256(raw.numpy().tobytes()).hexdigest())
        elif isinstance(leaf, Tensor):
            parts.append(f"{tuple(leaf.shape)}{leaf.dtype}")
        elif isinstance(leaf, bool | int | float | str | type(None)):
            parts.append(repr(leaf))
        else:
            parts.append(type(leaf).__qualname__)
    return "|".join(parts)


def _output_json(leaves: list[Any]) -> str:
    return json.dumps([[str(t.dtype), [int(d) for d in t.shape]] for t in leaves if isinstance(t, Tensor)])


class _Recorder:
    """The forward of one layer while repeats are recorded."""

    def __init__(self, repeats: Repeats) -> None:
        self.repeats = repeats
        self.seen: dict[str, LayerKind] = {}
        self.stack: list[int] = []

    def _note(self, path: str, kind: int) -> None:
        self.repeats.calls.append(LayerCall(path, kind, self.stack[-1] if self.stack else None))

    def call(self, path: str, structure: str, forward: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        key = structure + _argument_key(leaves, spec)
        kind = self.seen.get(key)
        if kind is None:
            return self._trace(path, key, forward, args, kwargs)
        self._note(path, kind.index)
        kind.paths.append(path)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        flat = torch.ops.omnicompile.repeated_layer(tensors, path, kind.index, _output_json(kind.out_leaves))
        results = iter(flat)
        out = [next(results) if isinstance(leaf, Tensor) else leaf for leaf in kind.out_leaves]
        assert kind.out_spec is not None
        return tree_unflatten(out, kind.out_spec)

    def _trace(self, path: str, key: str, forward: Any, args: Any, kwargs: Any) -> Any:
        kind = LayerKind(len(self.repeats.kinds), path, [path])
        self.repeats.kinds.append(kind)
        self._note(path, kind.index)
        self.stack.append(kind.index)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.stack.pop()
        kind.out_leaves, kind.out_spec = tree_flatten(result)
        self.seen[key] = kind
        return result


@contextlib.contextmanager
def record_repeats(model: nn.Module) -> Iterator[Repeats]:
    """While active, layers of `model` are traced once a kind. The layers' forwards are restored at the end."""
    candidates = layer_candidates(model)
    keys = structure_keys(candidates)
    first = {key: path for path, key in reversed(keys.items())}
    repeats = Repeats(alike=frozenset(path for path, key in keys.items() if first[key] != path))
    recorder = _Recorder(repeats)
    wrapped = []
    try:
        for path, (module, _, _) in candidates.items():
            original = module.forward

            def forward(*args: Any, _path: str = path, _original: Any = original, **kwargs: Any) -> Any:
                return recorder.call(_path, keys[_path], _original, args, kwargs)

            wrapped.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield repeats
    finally:
        for module, own in wrapped:
            if own is None:
                del module.forward
            else:
                module.forward = own
