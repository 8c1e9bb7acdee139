"""Optimizers over the shards of a ParallelModule, or over a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from omnicompile.errors import InputError
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.train.muon import Matrix, Muon
from omnicompile.train.options import OptimizerKind, OptimizerOptions


def make_optimizer(module: nn.Module, options: OptimizerOptions | None = None) -> Optimizer:
    """An optimizer for what `parallelize` returned (or any module), over parameters that require a gradient.

    Norms and biases (all parameters of one dimension) do not decay. AdamW works element by element, so that shards
    need nothing from other ranks. Muon takes the weights of linear layers, but of output heads, and leaves the others
    to AdamW. Raises InputError where there is nothing to train, or nothing for Muon.
    """
    options = options or OptimizerOptions()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trained:
        raise InputError("there is nothing to train: no parameter requires a gradient")
    common = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.name is OptimizerKind.ADAMW:
        return torch.optim.AdamW(_groups(trained, frozenset(), options), **common, fused=True)  # type: ignore[arg-type]
    matrices = {name: matrix for name, matrix in _matrices(module, options).items() if name in trained}
    if not matrices:
        raise InputError("optimizer muon has nothing to do: no weight of a linear layer is trained; use name: adamw")
    by_parameter = {trained[name]: matrix for name, matrix in matrices.items()}
    groups = _groups(trained, frozenset(matrices), options)
    return Muon(groups, by_parameter, momentum=options.momentum, **common)  # type: ignore[arg-type]


def _groups(
    trained: Mapping[str, nn.Parameter], matrices: frozenset[str], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """By whether they decay and whether Muon takes them; groups without a parameter are left out."""
    kinds = {
        "matrices": {"weight_decay": options.weight_decay, "muon": True},
        "decayed": {"weight_decay": options.weight_decay},
        "others": {"weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for name, value in trained.items():
        kind = "matrices" if name in matrices else "decayed" if value.dim() > 1 else "others"
        members[kind].append(value)
    return [{"params": members[kind], **values} for kind, values in kinds.items() if members[kind]]


@dataclass(frozen=True)
class _Linears:
    """Weights of linear layers by name; those of the output head."""

    weights: frozenset[str]
    heads: frozenset[str]


def _matrices(module: nn.Module, options: OptimizerOptions) -> dict[str, Matrix]:
    """What Muon takes, by parameter name."""
    distributed = isinstance(module, ParallelModule)
    linears = _linears(module.engine.model if isinstance(module, ParallelModule) else module)
    found = {}
    for name, value in module.named_parameters():
        left = any(fnmatchcase(name, pattern) for pattern in options.adamw)
        if name in linears.weights and name not in linears.heads and not left and value.dim() == 2:
            found[name] = _sharded(module, name) if distributed else Matrix(_same, _same)  # type: ignore[arg-type]
    return found


def _linears(model: nn.Module) -> _Linears:
    from transformers import PreTrainedModel

    weights, heads = set(), set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, inner in model.named_modules():
        if not isinstance(inner, nn.Linear):
            continue
        name = f"{path}.weight" if path else "weight"
        weights.add(name)
        if inner is output or id(inner.weight) in embeddings:
            heads.add(name)
    return _Linears(frozenset(weights), frozenset(heads))


def _sharded(module: ParallelModule, name: str) -> Matrix:
    store = module.store
    cut = partial(store.specs[name].local_of, mesh=store.mesh.mesh, rank=store.mesh.rank)
    return Matrix(partial(store.full, name), cut)


def _same(value: torch.Tensor) -> torch.Tensor:
    return value
