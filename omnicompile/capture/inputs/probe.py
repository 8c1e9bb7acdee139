"""Run a forward on fake tensors and see where the encoders' features enter the text sequence.

The number of placeholder tokens per image or clip depends on merging, pooling, tiling and separators, which every model
does its own way. So it is not computed but observed: whatever merges features into the text embeddings writes N rows
where a mask selects placeholders, and N is the number wanted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omnicompile.anchors.huggingface import anchored
from omnicompile.capture.host_mode import HostMode
from omnicompile.capture.inputs.types import FloatSpec
from omnicompile.capture.repeats import record_repeats
from omnicompile.capture.trace import fake_parameters, find_loss, value_checks_off
from omnicompile.torch_compat import FakeTensorMode, new_fake_mode

_VALUE_ERRORS = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
_MASKED_SCATTERS = frozenset({Tensor.masked_scatter, Tensor.masked_scatter_, torch.masked_scatter})
_INDEX_PUTS = frozenset({Tensor.index_put, Tensor.index_put_, torch.index_put, torch.index_put_})


class _Observed(BaseException):
    """Ends a forward early: what it was run for has been seen. No Exception, so that a model cannot swallow it."""


@dataclass(frozen=True)
class Observation:
    """rows: features that were merged into the text (None: none seen). loss_dim: dimensions of the loss, None without
    one. error: what ended the forward early, if anything did."""

    rows: int | None = None
    loss_dim: int | None = None
    error: Exception | None = None

    @property
    def depends_on_values(self) -> bool:
        """Whether the forward ended because its control flow or shapes depend on the values of a fake tensor."""
        names = {kind.__name__ for kind in type(self.error).__mro__} if self.error is not None else set()
        text = str(self.error)
        return bool(names & _VALUE_ERRORS) or "only concrete integers" in text or bool(re.search(r"\bu\d+\b", text))


def stated_rows(error: Exception, placeholders: int) -> int:
    """The number of features that an error speaks of, where a model counts `placeholders` placeholders itself before it
    merges features into them, or adds the features to their embeddings; 0 if the error is about something else."""
    told = re.search(r"tokens.*features:? *\(?(\d+)", str(error))
    if told is not None:
        return int(told[1])
    sizes = re.search(
        r"size of tensor a \((?P<ours>\d+)\) must match the size of tensor b \((?P<wanted>\d+)\)", str(error)
    )
    sizes = sizes or re.search(r"torch.Size\(\[(?P<wanted>\d+)\]\).* broadcastable to \[(?P<ours>\d+)\]", str(error))
    if sizes is None or placeholders == 0:
        return 0
    ours, wanted = int(sizes["ours"]), int(sizes["wanted"])
    fits = ours % placeholders == 0 and wanted % (ours // placeholders) == 0
    return wanted // (ours // placeholders) if fits else 0


class _Watch(TorchFunctionMode):
    """Sees features written over masked positions of a text sequence of `seq_len` tokens."""

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.rows: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rows = self._merged_rows(func, args, kwargs)
        if rows:
            self.rows = rows
            raise _Observed
        return func(*args, **kwargs)

    def _merged_rows(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        if func in _MASKED_SCATTERS:
            target, source = args[0], args[2] if len(args) > 2 else kwargs.get("source")
        elif func is Tensor.__setitem__ and _selects_positions(args[1]):
            target, source = args[0], args[2]
        elif func in _INDEX_PUTS:
            target, source = args[0], args[2] if len(args) > 2 else kwargs.get("values")
        else:
            return None
        if not isinstance(source, Tensor) or not target.is_floating_point() or self.seq_len not in target.shape[:2]:
            return None
        # One vector for all positions is a special token's embedding, not features.
        return int(source.numel() // source.shape[-1]) if source.dim() > 1 else None


def _selects_positions(index: Any) -> bool:
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, Tensor) and first.dtype == torch.bool


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, FloatSpec):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _plain_state_restored(model: nn.Module) -> Iterator[None]:
    """In evaluation mode meanwhile (dropout changes no shape). Attributes that a forward sets on modules, such as
    cached position offsets, would outlive their fake mode."""

    def public(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in module.__dict__.items() if not name.startswith("_")}

    before = {module: public(module) for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, attributes in before.items():
            for name in public(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


def observe(
    model: nn.Module, kwargs: Mapping[str, Any], host: set[str], seq_len: int, whole: bool = False
) -> Observation:
    """Run `model(**kwargs)` on fake tensors; `host` names the arguments kept real. seq_len: length of the text rows.
    Stops where features meet the text, unless `whole`, which runs to the loss."""
    mode = new_fake_mode()
    watch = _Watch(seq_len)
    values = {name: value if name in host else _fake(value, mode) for name, value in kwargs.items()}
    with contextlib.ExitStack() as stack:
        for context in (value_checks_off(), _plain_state_restored(model), fake_parameters(model, mode, distinct=False)):
            stack.enter_context(context)
        stack.enter_context(anchored(model, planning=True))
        stack.enter_context(record_repeats(model))
        try:
            features = [v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point()]
            with torch.no_grad(), mode, HostMode(features), contextlib.nullcontext() if whole else watch:
                loss = find_loss(model(**values))
        except _Observed:
            return Observation(rows=watch.rows)
        except Exception as error:
            return Observation(error=error)
    return Observation(loss_dim=loss.dim())
