"""Muon on shards: momentum stays cut up, the matrix is gathered for its orthogonalization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

Cut = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrix:
    """How a stored parameter relates to its whole matrix. full: the whole of a shard, on every rank (a collective).
    local: this rank's shard of a whole."""

    full: Cut
    local: Cut


class Muon(Optimizer):
    """Groups with `muon: True` take orthogonalized momentum (torch.optim.Muon's iteration), the others AdamW.

    An orthogonalized matrix is no function of its rows alone. So every rank gathers the update of one matrix after
    another, orthogonalizes it, and keeps its own shard: momentum needs no memory beside the shards. Updates are scaled
    by 0.2 * sqrt(max(rows, columns)), which gives them the size of AdamW's, so that one learning rate serves both.
    matrices: of every parameter in a group with `muon: True`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Mapping[nn.Parameter, Matrix],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        fused: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(groups, defaults | {"muon": False, "fused": fused})
        self._matrices = dict(matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
            else:
                self._step_others(group)
        return loss

    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        momentum, lr = group["momentum"], float(group["lr"])
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov
            matrix = self._matrices[parameter]
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(matrix.local(orthogonalized(matrix.full(update))), alpha=-lr)

    def _step_others(self, group: Mapping[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters, [p.grad for p in parameters], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], fused=group["fused"],
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def orthogonalized(update: Tensor) -> Tensor:
    """`update` [rows, columns] with its singular values near 1, times 0.2 * sqrt(max(rows, columns)).

    torch has the iteration in its optimizer only: one step of it, without momentum and decay, on a matrix of zeros.
    """
    matrix = nn.Parameter(torch.zeros_like(update))
    matrix.grad = update
    torch.optim.Muon(
        [matrix], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return -matrix.detach()
