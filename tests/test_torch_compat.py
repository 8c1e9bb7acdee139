"""Canaries: each private torch API that `omnicompile.torch_compat` uses still does what it is used for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from omnicompile.torch_compat import (
    as_in_eager,
    compile_for,
    compiler_backend,
    inductor_cache_counts,
    is_plain_host_tensor,
    measured_peak,
    new_fake_mode,
    nodes_traced_since,
    outside_tracing,
    traced_nodes,
    unseen,
    varlen_backward,
    varlen_forward,
    with_autograd,
)


def test_fake_tensors_are_no_host_tensors_and_can_be_left() -> None:
    with new_fake_mode():
        fake = torch.ones(3)
        with outside_tracing():
            real = torch.ones(3)
    assert not is_plain_host_tensor(fake)
    assert is_plain_host_tensor(real)
    assert not is_plain_host_tensor(torch.ones(3, requires_grad=True))


def test_autograd_beneath_an_operator() -> None:
    """Where a custom operator's implementation runs, nothing is recorded for a backward."""
    found = []
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        for scope in (torch.enable_grad(), with_autograd()):
            with scope:
                x = torch.ones(2, requires_grad=True)
                found.append((x * x).sum())
    assert [value.requires_grad for value in found] == [False, True]
    found[1].backward()


def test_nodes_can_be_counted_and_taken_while_tracing() -> None:
    seen: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        before = traced_nodes()
        y = x.sin().cos()
        seen.extend(node.name for node in nodes_traced_since(before))
        return y

    make_fx(function)(torch.ones(2))
    assert sorted(seen) == ["cos", "sin"]


def test_the_peak_of_a_run_is_measured() -> None:
    assert measured_peak(lambda x: (x + 1).sum(), [torch.zeros(100)]) == 2 * 400 + 4


def test_a_compiler_can_be_called_by_its_name() -> None:
    seen: list[int] = []

    def compile(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(len(inputs))
        return compiler_backend("aot_eager")(gm, inputs)

    function = torch.compile(lambda x: x.sin() + 1, backend=compile)
    assert function(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert seen == [1]


def test_a_compiler_can_be_called_without_torch_compile() -> None:
    gm = make_fx(lambda x: [x.sin() + 1])(torch.zeros(2))
    seen: list[torch.Tensor] = []

    def compile(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.extend(inputs)
        return compiler_backend("aot_eager")(gm, inputs)

    function = compile_for(compile, gm, (torch.zeros(2, requires_grad=True),))
    assert [x.tolist() for x in function(torch.zeros(2))] == [[1.0, 1.0]]
    (given,) = seen
    assert given.shape == (2,) and not given.requires_grad and not is_plain_host_tensor(given)


def test_what_is_asked_of_tensors_can_be_hidden() -> None:
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    with Mode():
        with unseen():
            x.numel()
        x.numel()
    assert seen == ["numel"]


@pytest.mark.slow
def test_inductor_counts_what_it_finds_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = [inductor_cache_counts()]
    for _ in range(2):
        torch.compiler.reset()
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
        found.append(inductor_cache_counts())
    steps = [{name: after[name] - before[name] for name in before} for before, after in pairwise(found)]
    assert steps == [{"hit": 0, "miss": 1, "bypass": 0}, {"hit": 1, "miss": 0, "bypass": 0}]


def test_an_export_can_look_like_an_ordinary_run() -> None:
    seen: list[tuple[bool, bool]] = []

    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with as_in_eager():
                seen.append((torch.compiler.is_exporting(), torch.compiler.is_compiling()))
            seen.append((torch.compiler.is_exporting(), torch.compiler.is_compiling()))
            return x + 1

    torch.export.export(Asks(), (torch.ones(2),), strict=False)
    assert seen[:2] == [(False, False), (True, True)]


def test_packed_attention_takes_what_it_is_given() -> None:
    """On meta tensors: that the operators are there, with these arguments. Values need a GPU (tests/kernels)."""
    q, k, v, out, grad = (torch.empty(48, 4, 32, dtype=torch.bfloat16, device="meta") for _ in range(5))
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    lse = torch.empty(4, 48, device="meta")
    values = varlen_forward([q, k, v], (bounds, bounds), (48, 48), 0.3, (-1, 0))
    assert [t.shape for t in values] == [out.shape, lse.shape]
    grads = varlen_backward(grad, [q, k, v, out], lse, (bounds, bounds), (48, 48), 0.3, (-1, 0))
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]
