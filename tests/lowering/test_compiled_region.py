"""Calls of a region share functions, one for each layout of the inputs, and find theirs once."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from omnicompile.lowering.compiled_region import FixedCall, FixedShapes
from omnicompile.lowering.regions import compile_regions
from omnicompile.torch_compat import compile_for, compiler_backend


def work(x: Tensor, y: Tensor) -> list[Tensor]:
    return [torch.relu(x @ y) + 1, *torch.split(x, 2)]


INPUTS = (torch.randn(4, 4), torch.randn(4, 4))


class Recorded:
    """A compiler that counts, whose functions take inputs of the strides that they were made for only."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
        self.made += 1
        strides = [x.stride() for x in inputs]

        def function(*given: Tensor) -> Any:
            assert [x.stride() for x in given] == strides
            return gm(*given)

        return function


def test_calls_share_functions_and_other_strides_get_their_own() -> None:
    compiler = Recorded()
    region = FixedShapes(make_fx(work)(*INPUTS), compiler)
    first, second = FixedCall(region), FixedCall(region)
    turned = (INPUTS[0].T, INPUTS[1])
    for call in (first, second, first):
        assert torch.equal(call(*INPUTS)[0], work(*INPUTS)[0])
    assert compiler.made == 1
    for _ in range(2):
        assert torch.equal(first(*turned)[0], work(*turned)[0])
    assert torch.equal(first(*INPUTS)[0], work(*INPUTS)[0])
    assert compiler.made == 2


def test_an_error_of_the_function_is_given_on() -> None:
    calls = []

    def compile(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
        def function(*given: Tensor) -> Any:
            calls.append(1)
            raise AssertionError("of the function")

        return function

    call = FixedCall(FixedShapes(make_fx(work)(*INPUTS), compile))
    for _ in range(2):
        with pytest.raises(AssertionError, match="of the function"):
            call(*INPUTS)
    assert len(calls) == 2


def between() -> None:
    """What ends a region."""


def test_elements_of_a_tuple_are_given_one_by_one() -> None:
    """Also where another region reads them."""
    gm = make_fx(lambda x, y: torch.relu(torch.split(x @ y, 2)[1]))(*INPUTS)
    element, *_ = gm.graph.find_nodes(op="call_function", target=operator.getitem)
    with gm.graph.inserting_before(element):
        gm.graph.call_function(between)
    given: list[Any] = []

    def compile(module: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
        def function(*inputs: Any) -> Any:
            given.append(module(*inputs))
            return given[-1]

        return function

    compiled, count = compile_regions(gm, lambda module, dynamic: FixedShapes(module, compile))
    assert count == 2
    assert torch.equal(compiled(*INPUTS), torch.relu(torch.split(INPUTS[0] @ INPUTS[1], 2)[1]))
    assert [[type(value) for value in values] for values in given] == [[Tensor], [Tensor]]


@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_compilers_are_given_what_they_expect(name: str) -> None:
    seen: list[Any] = []

    def compiler(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(inputs)
        return compiler_backend(name)(gm, inputs)

    weight = nn.Parameter(INPUTS[1])
    with torch.no_grad():
        function = compile_for(compiler, make_fx(work)(*INPUTS), (INPUTS[0], weight))
        got = function(INPUTS[0], weight)
    assert [tuple(x.shape) for x in seen] == [(4, 4), (4, 4)] and not any(x.requires_grad for x in seen)
    for ours, want in zip(got, work(*INPUTS), strict=True):
        torch.testing.assert_close(ours, want.detach())
        assert not ours.requires_grad
