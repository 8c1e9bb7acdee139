"""How the packages of flash-attention are called, without them: stand-ins with the signatures of their repository
(Dao-AILab/flash-attention, commit 0251105a) compute what the arguments mean, in the layouts that they document. Values
of the kernels themselves need a GPU (test_numerics.py)."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omnicompile.kernels.attention import reference
from omnicompile.kernels.attention.call import Call
from omnicompile.kernels.samples import sample

from .problems import attention_problems

CPU = torch.device("cpu")
# Names of the arguments in order; a * stands before those with defaults.
_TWO = "dropout_p softmax_scale causal"
SIGNATURES = {
    "flash2": {
        "flash_attn.flash_attn_interface": {
            "_flash_attn_forward": f"q k v {_TWO} window_size_left window_size_right softcap "
            "alibi_slopes return_softmax",
            "_flash_attn_varlen_forward": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {_TWO} * "
            "window_size_left window_size_right softcap alibi_slopes return_softmax block_table leftpad_k seqused_k "
            "zero_tensors num_splits",
            "_flash_attn_backward": f"dout q k v out softmax_lse dq dk dv {_TWO} window_size_left window_size_right "
            "softcap alibi_slopes deterministic * rng_state",
            "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q "
            f"max_seqlen_k {_TWO} window_size_left window_size_right softcap alibi_slopes deterministic * rng_state "
            "zero_tensors",
        }
    },
    "flash3": {
        "flash_attn_interface": {
            "_flash_attn_forward": "q k v * k_new v_new qv out_ cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q "
            "seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
            "seqlens_rotary q_descale k_descale v_descale softmax_scale causal window_size_left window_size_right "
            "attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin",
            "_flash_attn_backward": "dout q k v out softmax_lse * cu_seqlens_q cu_seqlens_k sequed_q sequed_k "
            "max_seqlen_q max_seqlen_k dq dk dv softmax_scale is_causal window_size_left window_size_right softcap "
            "deterministic sm_margin",
        }
    },
    "flash4": {
        "flash_attn.cute.interface": {
            "_flash_attn_fwd": "q k v * qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k "
            "min_seqlen_k page_table softmax_scale causal softcap window_size_left window_size_right learnable_sink "
            "return_lse out lse",
            "_flash_attn_bwd": "q k v out dout lse * softmax_scale causal softcap window_size_left window_size_right "
            "cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k deterministic dq dk dv",
        }
    },
}


def stand_in(arguments: str, compute: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function with these arguments, which gives what `compute` makes of them."""
    needed, _, optional = (part.split() for part in arguments.partition("*"))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind) for name in needed]
        + [inspect.Parameter(name, kind, default=None) for name in optional]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return compute(dict(bound.arguments))

    return function


def meant(given: dict[str, Any]) -> Call:
    left, right = (
        -1 if given[f"window_size_{side}"] is None else given[f"window_size_{side}"] for side in ("left", "right")
    )
    causal = bool(given.get("causal") or given.get("is_causal")) or (left >= 0 and right == 0)
    window = left + 1 if left >= 0 else 0
    bounds = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    assert all(b is None or b.dtype is torch.int32 for b in bounds)
    return Call(*bounds, None, causal, given["softmax_scale"], window, given["softcap"] or 0.0)


def by_head(x: Tensor, packed: bool) -> Tensor:
    assert x.stride(-1) == 1 and x.dim() == (3 if packed else 4)
    return (x.unsqueeze(0) if packed else x).transpose(1, 2)


def by_row(x: Tensor, packed: bool) -> Tensor:
    x = x.transpose(1, 2)
    return x.squeeze(0) if packed else x


def forward(given: dict[str, Any]) -> tuple[Any, ...]:
    """Rows behind the last segment, which the kernels do not write, hold anything."""
    packed = given.get("cu_seqlens_q") is not None
    out, lse = reference.forward(*(by_head(given[name], packed) for name in "qkv"), meant(given))
    out = by_row(out, packed)
    if packed:
        out[int(given["cu_seqlens_q"][-1]) :] = float("nan")
    return out, lse.squeeze(0) if packed else lse, None, None


def backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    packed = given.get("cu_seqlens_q") is not None
    lse = given["softmax_lse"] if "softmax_lse" in given else given["lse"]
    inputs = (by_head(given[name], packed) for name in ("dout", "q", "k", "v", "out"))
    *grads, _ = reference.backward(*inputs, lse.unsqueeze(0) if packed else lse, meant(given))
    rows = [by_row(grad, packed) for grad in grads]
    for name, value in zip(("dq", "dk", "dv"), rows):
        if given[name] is not None:
            given[name].copy_(value)
    return tuple(rows)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_calls_mean_what_the_operator_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for path, functions in SIGNATURES[name].items():
        module = types.ModuleType(path)
        for function, arguments in functions.items():
            compute = backward if "backward" in function or "bwd" in function else forward
            setattr(module, function, stand_in(arguments, compute))
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, f"omnicompile.kernels.attention.{name}", raising=False)
    functions_of = importlib.import_module(f"omnicompile.kernels.attention.{name}").FUNCTIONS
    monkeypatch.delitem(sys.modules, f"omnicompile.kernels.attention.{name}")
    for problem in attention_problems("cpu", torch.float32):
        run = sample(problem, CPU)
        for got, want in zip(run(functions_of), run(reference.FUNCTIONS), strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, p=problem: f"{p}\n{text}")
