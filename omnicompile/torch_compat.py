"""Every use of a private torch API, in one place. `tests/test_torch_compat.py` holds a canary for each."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensorMode, disable_functional_mode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

OpOverload = torch._ops.OpOverload

CompilerBackend = Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., Any]]

__all__ = [
    "CompilerBackend",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "compile_for",
    "compiler_backend",
    "inductor_cache_counts",
    "is_autocast_switch",
    "is_grad_switch",
    "is_plain_host_tensor",
    "local_ranks_mode",
    "measured_peak",
    "new_fake_mode",
    "nodes_traced_since",
    "on_each_rank",
    "outside_tracing",
    "ranked",
    "start_fake_group",
    "trace_pre_dispatch",
    "traced_nodes",
    "unseen",
    "varlen_backward",
    "varlen_forward",
    "with_autograd",
]


def new_fake_mode(static_shapes: bool = True) -> FakeTensorMode:
    """A FakeTensorMode with a ShapeEnv, which boolean indexing in a joint trace needs."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=static_shapes)


def is_plain_host_tensor(value: object) -> bool:
    """True for an ordinary CPU tensor that no tracing mode has wrapped and that carries no gradient."""
    if not isinstance(value, torch.Tensor) or type(value) is not torch.Tensor:
        return False
    return (
        value.device.type == "cpu"
        and not value.requires_grad
        and not torch._is_functional_tensor(value)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Run what is inside for real, although a fake mode, a proxy mode or a torch-function mode is active."""
    with contextlib.ExitStack() as stack:
        for switch in (unset_fake_temporarily, disable_proxy_modes_tracing, disable_functional_mode):
            stack.enter_context(switch())
        stack.enter_context(unseen())
        yield


def unseen() -> contextlib.AbstractContextManager[None]:
    """Inside, no torch-function mode sees what is asked of tensors."""
    switch: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return switch


@contextlib.contextmanager
def as_in_eager() -> Iterator[None]:
    """While active, torch says that nothing is being exported or compiled, so that a model that asks takes the same
    branches in an export as in an ordinary run."""
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before


@contextlib.contextmanager
def with_autograd() -> Iterator[None]:
    """Autograd works inside, also where an operator's implementation runs beneath it (as every custom operator's does):
    for implementations that call functions made of autograd or of torch.func."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C.DispatchKey
    autograd = (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor)
    for key in (*autograd, keys.FuncTorchDynamicLayerFrontMode, keys.FuncTorchDynamicLayerBackMode):
        exclude = exclude.remove(key)  # compiled code leaves torch.func out as well
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def trace_pre_dispatch(func: Callable[..., Any], args: list[torch.Tensor]) -> fx.GraphModule:
    """`func(*args)` as a functional graph of pre-dispatch operators, in which `linear` and attention stay whole.

    It is what torch.export traces, without the passes, checks and copies that take most of its time. Gradient switches
    appear as `torch._C._set_grad_enabled` calls, real tensors that enter as attributes.
    """
    functional = dispatch_functionalize(func, FunctionalTensorMode(pre_dispatch=True, export=True))
    return make_fx(functional, pre_dispatch=True, _allow_non_fake_inputs=True)(*args)


def traced_nodes() -> int:
    """How many nodes the graph being traced has so far."""
    mode = get_proxy_mode()
    assert mode is not None, "nothing is being traced"
    return len(mode.tracer.graph.nodes)


def nodes_traced_since(count: int) -> list[fx.Node]:
    """The nodes of the graph being traced after the first `count`."""
    mode = get_proxy_mode()
    assert mode is not None, "nothing is being traced"
    graph = mode.tracer.graph
    return list(islice(reversed(graph.nodes), len(graph.nodes) - count))


def is_grad_switch(node: fx.Node) -> bool:
    """True for a `set_grad_enabled(...)` call in a pre-dispatch graph."""
    return node.op == "call_function" and node.target is torch._C._set_grad_enabled


def is_autocast_switch(node: fx.Node) -> bool:
    """True for the start or end of an autocast region in a pre-dispatch graph."""
    switches = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
    return node.op == "call_function" and node.target in switches


def local_ranks_mode(world: int) -> contextlib.AbstractContextManager[object]:
    """Many ranks in one process: inside, operators on `ranked` tensors run once per rank, collectives between them.

    Starts a fake process group of `world` ranks if there is none.
    """
    from torch.distributed._local_tensor import LocalTensorMode

    start_fake_group(world)
    return LocalTensorMode(world)


def measured_peak(function: Callable[..., Any], arguments: Sequence[torch.Tensor]) -> int:
    """Most bytes of tensors alive while `function(*arguments)` runs, the arguments included (MemTracker)."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*arguments)
    with tracker:
        function(*arguments)
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def compiler_backend(name: str) -> CompilerBackend:
    """What torch.compile calls with each graph for `backend=name`."""
    from torch._dynamo import lookup_backend

    found: CompilerBackend = lookup_backend(name)
    return found


def compile_for(compiler: CompilerBackend, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What `compiler` makes of `gm`, a functional graph of ATen operators without gradients, for inputs of these fixed
    shapes: as torch.compile calls it, without the checks of the inputs that torch.compile puts before each call."""
    from torch._guards import TracingContext, tracing

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x.detach(), static_shapes=True) if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad(), tracing(TracingContext(mode)):
        return compiler(deepcopy(gm), fakes)  # which may change it


def inductor_cache_counts() -> dict[str, int]:
    """What became of the graphs that this process gave to Inductor: "hit" were in its cache, "miss" were compiled and
    put there, "bypass" were compiled and cannot be kept."""
    from torch._dynamo.utils import counters

    return {what: counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")}


def start_fake_group(world: int) -> None:
    """A default process group of `world` ranks that does not communicate; replaces a fake group of another size."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        if dist.get_world_size() == world and dist.get_backend() == "fake":
            return
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


def ranked(values: list[torch.Tensor]) -> torch.Tensor:
    """One tensor that holds `values[r]` on rank r, for use under `local_ranks_mode`."""
    from torch.distributed._local_tensor import LocalTensor

    return LocalTensor(dict(enumerate(values)))  # type: ignore[arg-type]


def on_each_rank(value: torch.Tensor) -> list[torch.Tensor]:
    """What each rank holds of a `ranked` tensor, by rank."""
    from torch.distributed._local_tensor import LocalTensor

    assert isinstance(value, LocalTensor)
    return [value._local_tensors[rank] for rank in sorted(value._local_tensors)]  # type: ignore[attr-defined]


def varlen_forward(
    tensors: Sequence[torch.Tensor],
    bounds: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.attention.varlen.varlen_attn: the output and the log-sum-exp. tensors: q, k and v. Arguments as in
    `varlen_backward`. torch 2.11 takes fewer key heads without being told of them, later ones ask for a word."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": tensors[0].shape[1] != tensors[1].shape[1]} if told else {}
    out, lse = varlen_attn(
        *tensors, *bounds, *lengths, return_aux=AuxRequest(lse=True), scale=scale, window_size=window, **options
    )
    return out, lse


def varlen_backward(
    grad: torch.Tensor,
    saved: Sequence[torch.Tensor],
    lse: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of torch.nn.attention.varlen.varlen_attn. saved: q, k, v and the output, each [len, heads, d]; lse
    [heads, len]; bounds and lengths: cu_seqlens and the longest segments of queries and keys."""
    import torch.nn.attention.varlen

    no_random = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        grad, *saved, lse, *bounds, *lengths, window == (-1, 0), no_random, scale, list(window)
    )
    return dq, dk, dv
