"""Every implementation that can run here against the reference: the value and every gradient.

On CPUs those are torch's CPU attention and torch's grouped product; with TRITON_INTERPRET=1 and the packages triton and
liger-kernel, Liger's kernels too, in float32. The rest runs on a GPU (`pytest -m gpu`).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omnicompile.kernels import grouped, operators
from omnicompile.kernels.registry import INDUCTOR, Functions, Kernel, Problem, hardware_of
from omnicompile.kernels.samples import sample
from omnicompile.kernels.table import KERNELS

from .problems import problems, worst_error

omni = torch.ops.omnicompile
CPU = torch.device("cpu")
# Roundings that add up in an implementation, relative to one.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
OTHERS = [kernel for kernel in KERNELS if kernel.name not in (INDUCTOR, "reference")]


def able(kernel: Kernel, device: torch.device) -> list[Problem]:
    """The problems that it computes. Skips the test where it cannot run at all."""
    hardware = hardware_of(device)
    if missing := kernel.missing(hardware):
        pytest.skip(f"{kernel.name}: {missing}")
    every = [p for dtype in TOLERANCE for p in problems(kernel.operator, hardware, dtype)]
    found = [problem for problem in every if not kernel.unable(problem)]
    assert found
    return found


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler does and the interpreter does not: a float argument becomes a float32 of Triton's, on which
    kernels call `.to`; and functions of the device's library, of which it has none, are computed (rsqrt)."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter as module

    convert = module._implicit_cvt

    def with_floats(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(module.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(module, "_implicit_cvt", with_floats)
    if find_spec("liger_kernel") is not None:
        monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))


@pytest.mark.parametrize("kernel", [k for k in OTHERS if "cpu" in k.hardware], ids=lambda k: f"{k.operator}-{k.name}")
def test_on_the_cpu(kernel: Kernel, interpreter: None) -> None:
    for problem in able(kernel, CPU):
        assert worst_error(kernel, problem, CPU) <= TOLERANCE[problem.dtype], problem


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernel", OTHERS, ids=lambda k: f"{k.operator}-{k.name}")
def test_on_a_gpu(kernel: Kernel) -> None:
    device = torch.device("cuda")
    for problem in able(kernel, device):
        assert worst_error(kernel, problem, device) <= TOLERANCE[problem.dtype], problem


def test_masks_and_caps_of_flex_attention() -> None:
    """Its forward runs on CPUs too; torch has no backward there. Beneath the operator autograd is switched off, and
    masks are made by functions that need it."""
    from omnicompile.kernels.attention import flex, reference

    for problem in problems("attention", "cpu", torch.float32):
        seen = []
        for module in (flex, reference):
            functions = Functions(module.forward, lambda *_: (torch.empty(0),))
            with torch._C._AutoDispatchBelowAutograd():
                seen.append(sample(problem, CPU)(functions)[0])
        assert (seen[0] - seen[1]).norm() <= 1e-5 * seen[1].norm(), problem


def test_flex_attention_beneath_compiled_code() -> None:
    """There torch.func is left out as well, which makes the masks."""
    from omnicompile.kernels.attention import flex, reference
    from omnicompile.kernels.attention.call import Call

    call = Call(None, None, None, True, 0.3, 0, 0.0)

    @torch.library.custom_op("omnicompile_tests::flex", mutates_args=())
    def attention(q: Tensor) -> Tensor:
        return flex.forward(q, q, q, call)[0]

    attention.register_fake(torch.empty_like)
    attention.register_autograd(lambda _, grad: grad)
    q = torch.randn(1, 2, 32, 16, requires_grad=True)
    got = torch.compile(lambda x: attention(x * 1.0), backend="aot_eager")(q)
    want = reference.forward(q, q, q, call)[0]
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_grouped_product_on_the_cpu(dtype: torch.dtype, transposed: bool) -> None:
    """torch computes it on CPUs too, though slower than expert by expert: the layouts are the same as on a GPU. Rows
    behind the last group, which torch leaves unwritten, and experts without rows give zeros."""
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 12, 0])
    rows = torch.randn(20, 16).to(dtype)
    weight = torch.randn(4, 16, 24).to(dtype) if transposed else torch.randn(4, 24, 16).to(dtype)
    grad = torch.randn(20, 24).to(dtype)
    for functions in (grouped.torch_grouped, grouped.reference):
        out = functions.forward(rows, weight, counts, transposed)
        d_weight = functions.backward(rows, grad, counts, transposed)
        assert not out[17:].any() and not d_weight[1].any() and not d_weight[3].any()
        assert d_weight.shape == weight.shape
    got, want = (f.forward(rows, weight, counts, transposed) for f in (grouped.torch_grouped, grouped.reference))
    assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()
    got, want = (f.backward(rows, grad, counts, transposed) for f in (grouped.torch_grouped, grouped.reference))
    assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()
    empty = rows[:0]
    assert grouped.torch_grouped.forward(empty, weight, torch.zeros(4, dtype=torch.int64), transposed).shape == (0, 24)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


TARGET = torch.tensor([3, -100, 0, 4])


@pytest.mark.parametrize("early", [False, True])
def test_normalisation_has_its_gradients(early: bool) -> None:
    torch.manual_seed(0)
    run = lambda x, w: omni.rms_norm(x, w, 1e-6, 0.5, early, "reference")[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, (double(3, 2, 6), double(6)))


def test_gates_rotations_and_losses_have_their_gradients() -> None:
    torch.manual_seed(0)
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g, u: omni.swiglu(g, u, "reference"), (double(3, 4), double(3, 4)))
    assert torch.autograd.gradcheck(lambda x: omni.rope(x, cos, sin, "reference"), (double(2, 2, 3, 4),))
    assert torch.autograd.gradcheck(lambda z: omni.cross_entropy(z, TARGET, -100, "reference")[0], (double(4, 5),))
    assert torch.autograd.gradcheck(
        lambda h, w: omni.linear_cross_entropy(h, w, TARGET, -100, "reference")[0], (double(4, 3), double(5, 3))
    )


def test_losses_are_those_of_torch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5)
    want = torch.nn.functional.cross_entropy(logits, TARGET, reduction="sum")
    torch.testing.assert_close(omni.cross_entropy(logits, TARGET, -100, "reference")[0], want)
    weight, hidden = torch.randn(5, 3), torch.randn(4, 3)
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), TARGET, reduction="sum")
    torch.testing.assert_close(omni.linear_cross_entropy(hidden, weight, TARGET, -100, "reference")[0], want)


def calls() -> dict[str, tuple[object, tuple[object, ...]]]:
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    turned = torch.randn(1, 5, 2, 8).transpose(1, 2).requires_grad_()  # laid out as projections leave it
    gate, up = torch.randn(6, 8, requires_grad=True).chunk(2, -1)
    cos, sin, logits = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(4, 5, requires_grad=True)
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    return {
        "rms_norm": (operators.rms_norm, (x, w, 1e-6, 0.0, True, "reference")),
        "swiglu": (operators.swiglu, (gate, up, "reference")),
        "rope": (operators.rope, (turned, cos, sin, "reference")),
        "cross_entropy": (operators.cross_entropy, (logits, TARGET, -100, "reference")),
        "linear_cross_entropy": (operators.linear_cross_entropy, (hidden, head, TARGET, -100, "reference")),
    }


@pytest.mark.parametrize("name", calls())
def test_operators_are_traced_as_they_run(name: str) -> None:
    """torch's own checks of schema, fake kernel (shapes, strides, dtypes), and autograd under tracing."""
    function, args = calls()[name]
    torch.library.opcheck(function, args)
