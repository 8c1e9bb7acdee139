"""The same interface over the plain model, for a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnicompile.errors import InputError
from omnicompile.runtime.parameters import bit_sum
from omnicompile.runtime.targets import SeveralLosses, TargetCount

IGNORE = -100


class PlainModule(nn.Module):
    """What `parallelize` returns for one process: the model itself behind the interface of ParallelModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that parameters keep their names
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._targets: int | None = None

    def forward(self, **batch: Any) -> Any:
        """The batch may be in host memory, as ParallelModule's."""
        home = next(self.parameters(), torch.empty(0)).device
        batch = {name: value.to(home) if isinstance(value, Tensor) else value for name, value in batch.items()}
        output = self._model[0](**batch)
        if self._targets is None:
            return output
        if not isinstance(self._model[0], SeveralLosses):
            output.loss = _share(output.loss, _targets(batch), self._targets)
            return output
        if not isinstance(self._targets, TargetCount):
            raise InputError("the model has several losses: give `targets` what count_targets returns")
        counts = self._model[0].target_counts(batch)
        whole = dict(zip(counts, self._targets.by_loss))
        shares = {n: _share(loss, counts[n], whole[n]) for n, loss in output.losses.items()}
        output.losses = shares
        output.loss = sum(share * self._model[0].loss_weight(name) for name, share in shares.items())
        return output

    def train(self, mode: bool = True) -> PlainModule:
        super().train(mode)
        self._model[0].train(mode)
        return self

    def count_targets(self, batches: Sequence[Mapping[str, Any]]) -> TargetCount:
        model = self._model[0]
        if isinstance(model, SeveralLosses):
            return TargetCount([sum(c) for c in zip(*(model.target_counts(batch).values() for batch in batches))])
        return TargetCount([sum(map(_targets, batches))])

    @contextlib.contextmanager
    def accumulate(self, last: bool, targets: int | None = None) -> Iterator[None]:
        """As ParallelModule's; the model's loss must be the mean over the targets in `labels`, shifted by one, or a sum
        of several that it can count (`SeveralLosses`)."""
        before, self._targets = self._targets, targets
        try:
            yield
        finally:
            self._targets = before

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model[0].state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self._model[0].load_state_dict(state_dict, strict, assign)

    @property
    def plain_model(self) -> nn.Module:
        return self._model[0]

    def stored(self) -> dict[str, Tensor]:
        return dict(self._model[0].named_parameters())

    def stored_buffers(self) -> dict[str, Tensor]:
        keys = self._model[0].state_dict().keys()
        return {name: value for name, value in self._model[0].named_buffers() if name in keys}

    def as_whole(self, name: str, local: Tensor) -> Tensor:
        return local.detach()

    def bit_sums(self, names: Sequence[str]) -> dict[str, int]:
        parameters = self.stored()
        return {name: int(bit_sum(parameters[name])) for name in names}

    def full_gradient(self, name: str) -> Tensor | None:
        return dict(self._model[0].named_parameters())[name].grad


def _share(loss: Tensor, targets: int, whole: int) -> Tensor:
    """Of a window's loss over `whole` targets, what a micro-step with `targets` of them adds. A mean over no targets is
    no number, and neither are its gradients: without targets it adds nothing to the loss and gives no gradient."""
    if not targets:
        return torch.zeros_like(loss, requires_grad=loss.requires_grad)
    return loss * (targets / whole)


def _targets(batch: Mapping[str, Any]) -> int:
    return int((batch["labels"][..., 1:] != IGNORE).sum())
