"""Registers the anchor operators with Hugging Face's own registries, and switches a model over to them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnicompile.anchors import attention as _attention  # noqa: F401  (defines the operator)
from omnicompile.anchors import experts as _experts  # noqa: F401
from omnicompile.anchors.masks import anchor_mask, is_bounds

# Hugging Face hands cu_seqlens to an attention function only if its name says that it is a flash one.
ATTENTION_NAME = "omnicompile_flash"
PACKED_ATTENTION_NAME = "omnicompile_flash_packed"
# Dropout changes no size and no cost worth pricing: a capture for planning leaves it out, an executed one refuses it.
PLANNING_ATTENTION_NAME = "omnicompile_flash_planning"
EXPERTS_NAME = "omnicompile"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature of Hugging Face's attention functions. Returns [batch, q_len, heads, v_head_dim]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # Part of Hugging Face's contract: an attention module without `is_causal` is causal.
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and query.shape[2] > 1
    if query.shape[0] == 1 < key.shape[0]:  # learned queries, one set for all: a matrix product would broadcast them
        query = query.expand(key.shape[0], -1, -1, -1)
    if attention_mask is not None and is_bounds(attention_mask):
        cu_seq_lens_q = cu_seq_lens_k = attention_mask
        attention_mask = None
    if attention_mask is not None:
        if dropout:
            raise NotImplementedError("attention dropout beside an attention mask is not supported: set it to 0")
        return _masked(query, key, value, attention_mask, scale, softcap, s_aux), None
    if dropout:
        raise NotImplementedError("attention dropout is not supported by the attention anchor: set it to 0")
    out, _lse = torch.ops.omnicompile.attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_k,
        s_aux,
        0 if cu_seq_lens_q is None else int(max_length_q or query.shape[2]),
        0 if cu_seq_lens_k is None else int(max_length_k or key.shape[2]),
        causal,
        scale,
        int(sliding_window or 0),
        float(softcap or 0.0),
    )
    return out.transpose(1, 2).contiguous(), None


def planning_attention_forward(*args: Any, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    """`attention_forward` without dropout."""
    return attention_forward(*args, **kwargs)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A mask that the model made itself is kept: torch's own attention takes it, but no soft cap and no sinks."""
    if softcap or sinks is not None:
        return _plain_attention(query, key, value, mask, scale, softcap, sinks).transpose(1, 2).contiguous()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention by ordinary operators, softmax in float32 at least. mask: boolean (True where seen) or added."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(mask.logical_not(), lowest) if mask.dtype == torch.bool else scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column.to(scores.dtype)], dim=-1).softmax(-1, dtype=exact)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=exact)
    return torch.matmul(weights.to(query.dtype), value)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The signature of Hugging Face's experts functions: [tokens, hidden] -> [tokens, hidden]."""
    ops = torch.ops.omnicompile
    rows, order, counts = ops.expert_dispatch(hidden_states, top_k_index, self.num_experts)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    inner = ops.grouped_mm(rows, up, counts, self.is_transposed)
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        inner = inner + ops.expert_bias(bias, counts, inner.shape[0])
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = ops.grouped_mm(inner, self.down_proj, counts, self.is_transposed)
    if self.has_bias:
        outer = outer + ops.expert_bias(self.down_proj_bias, counts, outer.shape[0])
    if self.has_post_expert_norm:
        outer = self.post_expert_norm(outer)
    return ops.expert_combine(outer, order, top_k_weights).to(hidden_states.dtype)


def is_plain_experts(module: nn.Module) -> bool:
    """Whether a module is gated experts in Hugging Face's usual form that does not go through its registry: stacked
    weights [experts, 2 * inner, hidden] and [experts, hidden, inner], and a loop over the experts that were chosen."""
    params = dict(module.named_parameters(recurse=False))
    if set(params) != {"gate_up_proj", "down_proj"} or hasattr(module, "has_gate"):
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)[1:4]
    if arguments != ["hidden_states", "top_k_index", "top_k_weights"] or not callable(getattr(module, "act_fn", None)):
        return False
    up, down = params["gate_up_proj"].shape, params["down_proj"].shape
    # Choices past the experts that have a second matrix are experts that hand on their input.
    return len(up) == len(down) == 3 and up[0] >= down[0] and up[1] == 2 * down[2] and up[2] == down[1]


def plain_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The kernels of `is_plain_experts` modules, for pricing: what such a loop does besides is left out."""
    ops = torch.ops.omnicompile
    rows, order, counts = ops.expert_dispatch(hidden_states, top_k_index, module.gate_up_proj.shape[0])
    both = ops.grouped_mm(rows, module.gate_up_proj, counts, False)
    if hasattr(module, "_apply_gate"):
        inner = module._apply_gate(both)
    else:
        gate, up = both.chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
    outer = ops.grouped_mm(inner, module.down_proj, counts[: module.down_proj.shape[0]], False)
    return ops.expert_combine(outer, order, top_k_weights).to(hidden_states.dtype)


def is_sorted_experts(module: nn.Module) -> bool:
    """Whether a module multiplies rows, sorted by expert and as many for each as a list says, with stacked weights
    [experts, out, in]."""
    params = dict(module.named_parameters(recurse=False))
    if set(params) != {"weight"} or params["weight"].dim() != 3 or any(module.children()):
        return False
    return list(inspect.signature(type(module).forward).parameters)[1:] == ["inputs", "expert_size"]


def sorted_experts_forward(module: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """The kernel of `is_sorted_experts` modules, for pricing: which expert gets how many rows is not known."""
    counts = inputs.new_zeros(module.weight.shape[0], dtype=torch.int64)
    return torch.ops.omnicompile.grouped_mm(inputs, module.weight, counts, False)


@contextlib.contextmanager
def _plain_experts_anchored(model: nn.Module) -> Iterator[None]:
    found = [module for module in model.modules() if is_plain_experts(module) or is_sorted_experts(module)]
    try:
        for module in found:
            priced = plain_experts_forward if is_plain_experts(module) else sorted_experts_forward
            module.forward = functools.partial(priced, module)
        yield
    finally:
        for module in found:
            del module.forward


def register() -> None:
    """Make the anchors known to transformers, through its public registries. May be called again.

    Under the planning name no mask is made: attention is priced as the kernel that it runs with.
    """
    from transformers import AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_forward)
    ALL_ATTENTION_FUNCTIONS.register(PLANNING_ATTENTION_NAME, planning_attention_forward)
    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, anchor_mask)
    AttentionMaskInterface.register(PACKED_ATTENTION_NAME, functools.partial(anchor_mask, packed=True))
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_forward)


@contextlib.contextmanager
def anchored(model: nn.Module, planning: bool = False, packed: bool = False) -> Iterator[None]:
    """While active, every Hugging Face module in `model` computes attention and experts through the anchors.

    A model class that says that it does not work with flash attention (it makes masks of its own, or computes attention
    itself) keeps the attention that it has, and gets the masks that go with it.

    planning: the graph is only priced, so attention dropout is left out instead of refused, every attention that goes
    through the registry is priced as a flash kernel, and experts that the registry does not know are priced by their
    kernels. packed: rows may have several samples (see `anchor_mask`).

    The name is set on the configurations after construction, because constructing a model with a flash attention name
    looks for a hub kernel; and it is taken back at the end, so that the caller's model is left as it was.
    """
    register()
    name = PLANNING_ATTENTION_NAME if planning else PACKED_ATTENTION_NAME if packed else ATTENTION_NAME
    configs = _configurations(model)
    before = [(c, c._attn_implementation_internal, c._experts_implementation_internal) for c, _ in configs]
    try:
        for config, flash in configs:
            if flash or planning:
                config._attn_implementation_internal = name
            config._experts_implementation_internal = EXPERTS_NAME
        with _plain_experts_anchored(model) if planning else contextlib.nullcontext():
            yield
    finally:
        for config, attn, experts in before:
            config._attn_implementation_internal = attn
            config._experts_implementation_internal = experts


def _configurations(model: nn.Module) -> list[tuple[Any, bool]]:
    """The model's configurations, and whether every model class that uses one works with flash attention. One that no
    module holds goes by the one that it is part of."""
    from transformers import PretrainedConfig, PreTrainedModel

    found: dict[int, tuple[Any, bool]] = {}

    def visit(module: nn.Module, flash: bool) -> None:
        if isinstance(module, PreTrainedModel):
            flash = bool(type(module)._supports_flash_attn)
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config, flash and found.get(id(config), (config, True))[1]
        for child in module.children():
            visit(child, flash)

    def collect(config: Any, flash: bool) -> None:
        for child in vars(config).values():
            if isinstance(child, PretrainedConfig) and id(child) not in found:
                found[id(child)] = child, flash
                collect(child, flash)

    visit(model, True)
    for config, flash in list(found.values()):
        collect(config, flash)
    return list(found.values())
