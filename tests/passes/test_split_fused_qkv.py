"""A product of query, key and value together becomes one for each, and the gradient of its weight stays one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from omnicompile.capture.classify import MATMULS
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes.async_ulysses import EXCHANGE
from omnicompile.passes.rank_program import ParamSpec, RankProgram
from omnicompile.passes.simulate import bound_to_fake_groups
from omnicompile.passes.split_fused_qkv import split_fused_qkv_pass
from omnicompile.plan import BlockPlan, Layout, Mesh, Overlap, Sharding
from omnicompile.torch_compat import new_fake_mode, trace_pre_dispatch

from .models import _build, block_plans, image_batches, text_batch, vision_language_model
from .parity import Parity, run_parity

aten = torch.ops.aten
TOKENS, WIDTH = 6, 5
SP2 = {"": BlockPlan(layout=Layout.SEQUENCE, sp=2)}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [tokens, heads, head_dim]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, _ = torch.ops.omnicompile.attention(q, k, v, None, None, None, TOKENS, TOKENS, True, 1.0, 0, 0.0)
    return out.squeeze(0).transpose(0, 1).flatten(1)


def program_of(function: Callable[..., Any], *shapes: tuple[int, ...], **changes: Any) -> RankProgram:
    """The second and further arguments are parameters."""
    with new_fake_mode():
        gm = trace_pre_dispatch(function, [torch.empty(shape) for shape in shapes])
    gm.graph.eliminate_dead_code()
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    params = {name: ParamSpec(name, shape) for name, shape in zip(names[1:], shapes[1:])}
    return replace(RankProgram(gm, Mesh(sp=2), SP2, params, {}), **changes)


def calls(gm: fx.GraphModule) -> list[str]:
    """Operators in order, with what they take that is no tensor."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "_schema", None)
            rest = [str(a) for a in node.args if not isinstance(a, fx.Node)]
            text = name.name.split("::")[-1] if name else "item"
            lines.append(f"{text} {', '.join(rest)}".strip())
    return lines


def counted(gm: fx.GraphModule, target: object = aten.linear.default) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def same(program: RankProgram) -> int:
    """Run the pass; the results must be equal. Returns the number of products then."""
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        for node in program.gm.graph.find_nodes(op="placeholder")
    ]
    want = program.gm(*values)
    after = split_fused_qkv_pass(program)
    torch.testing.assert_close(after.gm(*values), want, rtol=1e-12, atol=1e-12)
    for node in after.gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            assert node.meta["val"].device.type == "cpu"
    return sum(counted(after.gm, target) for target in MATMULS | {aten.matmul.default})


def unbound(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As in vision towers: [tokens, 3, heads, head_dim]."""
    q, k, v = nn.functional.linear(x, w, b).reshape(TOKENS, 3, 2, 4).permute(1, 0, 2, 3).unbind(0)
    return attention(q * 2.0, k.tanh(), v)


def test_the_graph_before_and_after() -> None:
    program = program_of(unbound, (TOKENS, WIDTH), (24, WIDTH), (24,))
    before = calls(program.gm)
    assert before[:6] == ["linear", "view [6, 3, 2, 4]", "permute [1, 0, 2, 3]", "unbind", "item 0", "item 1"]
    after = calls(split_fused_qkv_pass(program).gm)
    assert after[:13] == [
        "split_with_sizes [8, 8, 8], 0", "item 0", "item 1", "item 2",
        "split_with_sizes [8, 8, 8], 0", "item 0", "item 1", "item 2",
        "linear", "linear", "linear", "view [6, 2, 4]", "view [6, 2, 4]",
    ]  # fmt: skip
    assert program.log[-1] == "products of query, key and value: 1 split"


def contiguous(x: Tensor, w: Tensor) -> Tensor:
    """Slices of columns, fewer key heads than query heads."""
    y = nn.functional.linear(x, w)
    q, k, v = y[:, :16], y[:, 16:24], y[:, 24:]
    return attention(q.view(TOKENS, 4, 4), k.view(TOKENS, 2, 4), v.view(TOKENS, 2, 4))


def alternating(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Query, key and value of a head are neighbours, and the batch has a dimension of its own."""
    y = nn.functional.linear(x.unsqueeze(0), w, b).view(1, TOKENS, 2, 12).transpose(1, 2)
    q, k, v = y.chunk(3, -1)
    return attention(*(t.squeeze(0).transpose(0, 1) for t in (q, k, v)))


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """Two query heads, a key head and a value head are neighbours, in each of two groups."""
    y = nn.functional.linear(x, w).view(TOKENS, 2, 4, 4)
    q, k, v = y[:, :, :2].reshape(TOKENS, 4, 4), y[:, :, 2], y[:, :, 3]
    return attention(q, k, v)


def columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The weight is stored the other way."""
    q, k, v = torch.addmm(b, x, w).split(8, 1)
    return attention(*(t.view(TOKENS, 2, 4) for t in (q, k, v)))


def nested(x: Tensor, w: Tensor) -> Tensor:
    """Query, and key and value together, which are cut apart later."""
    y = x @ w
    q, kv = y.split([16, 16], 1)
    k, v = kv.view(TOKENS, 2, 8).chunk(2, -1)
    return attention(q.view(TOKENS, 4, 4), k, v)


def keys_and_values(x: Tensor, w: Tensor, own: Tensor) -> Tensor:
    q, (k, v) = nn.functional.linear(x, own), nn.functional.linear(x, w).view(TOKENS, 2, 2, 4).unbind(1)
    return attention(q.view(TOKENS, 2, 4), k, v)


@pytest.mark.parametrize(
    "function, shapes, products",
    [
        (unbound, [(24, WIDTH), (24,)], 3),
        (contiguous, [(32, WIDTH)], 3),
        (alternating, [(24, WIDTH), (24,)], 3),
        (grouped, [(32, WIDTH)], 3),
        (columns, [(WIDTH, 24), (24,)], 3),
        (nested, [(WIDTH, 32)], 3),
        (keys_and_values, [(16, WIDTH), (8, WIDTH)], 3),
    ],
)
def test_every_layout_of_columns(function: Callable[..., Any], shapes: list[tuple[int, ...]], products: int) -> None:
    assert same(program_of(function, (TOKENS, WIDTH), *shapes)) == products


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_order_of_dimensions(data: st.DataObject) -> None:
    """[tokens, 3, heads, head_dim] with the columns' dimensions in any order, taken apart in any order."""
    sizes = {"part": 3, "head": data.draw(st.integers(1, 3)), "dim": data.draw(st.sampled_from([1, 4]))}
    order = ["token", *data.draw(st.permutations(list(sizes)))]
    turned = data.draw(st.permutations(order))
    left = [name for name in turned if name != "part"]

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = nn.functional.linear(x, w).view(TOKENS, *(sizes[name] for name in order[1:]))
        parts = y.permute([order.index(name) for name in turned]).unbind(turned.index("part"))
        return attention(*(part.permute([left.index(name) for name in ("token", "head", "dim")]) for part in parts))

    assert same(program_of(function, (TOKENS, WIDTH), (3 * sizes["head"] * sizes["dim"], WIDTH))) == 3


def read_whole(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.linear(x, w)
    return attention(*(t.view(TOKENS, 2, 4) for t in y.chunk(3, 1))) * y.sum()


def overlapping(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.linear(x, w)
    return attention(*(y[:, i : i + 8].view(TOKENS, 2, 4) for i in (0, 8, 12)))


def not_all(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.linear(x, w)
    return attention(*(y[:, i : i + 4].view(TOKENS, 1, 4) for i in (0, 4, 8)))


def gated(x: Tensor, w: Tensor) -> Tensor:
    """The fourth part is no input of attention."""
    q, k, v, gate = nn.functional.linear(x, w).chunk(4, 1)
    return attention(*(t.view(TOKENS, 2, 4) for t in (q, k, v))) * gate.sigmoid()


def some_rows(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.linear(x, w)
    return attention(*(t.reshape(TOKENS, 2, 4) for t in y[:TOKENS].chunk(3, 1))) + y[1:, :8].sum()


@pytest.mark.parametrize(
    "function, columns", [(read_whole, 24), (overlapping, 24), (not_all, 24), (gated, 32), (some_rows, 24)]
)
def test_what_is_left_as_it_is(function: Callable[..., Any], columns: int) -> None:
    assert same(program_of(function, (TOKENS, WIDTH), (columns, WIDTH))) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": Mesh()},
        {"overlap": Overlap(exchanges=False)},
        {"blocks": {"": BlockPlan(layout=Layout.REPLICATED)}},
    ],
)
def test_only_where_exchanges_can_be_hidden(changes: dict[str, Any]) -> None:
    assert same(program_of(unbound, (TOKENS, WIDTH), (24, WIDTH), (24,), **changes)) == 1


# Whole models


def neox_model() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, use_cache=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return _build(GPTNeoXForCausalLM, config)


def phi_model() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return _build(Phi3ForCausalLM, config)


def parity(kind: str, mesh: Mesh, sharding: Sharding = Sharding.FSDP) -> Parity:
    if kind == "vlm":
        blocks = block_plans(mesh, sharding, Layout.SEQUENCE)
        return run_parity(vision_language_model(), image_batches(mesh.data_ranks), mesh, blocks)
    model = neox_model() if kind == "neox" else phi_model()
    return run_parity(model, [text_batch(seed) for seed in range(mesh.data_ranks)], mesh, block_plans(mesh, sharding))


SLOW = [
    ("vlm", Mesh(sp=2)),
    ("neox", Mesh(sp=2)),
    ("vlm", Mesh(dp_shard=2, sp=4)),
    ("neox", Mesh(dp_shard=4, sp=2)),
    ("phi", Mesh(dp_replicate=2, sp=4)),
]


@pytest.mark.parametrize(
    "kind, mesh", [("phi", Mesh(sp=2)), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_equal_to_one_process(kind: str, mesh: Mesh) -> None:
    result = parity(kind, mesh)
    assert "products of query, key and value: 2 split" in result.program.log
    assert result.loss_error < 1e-5 and result.worst[1] < 1e-5, result.worst
    gm = trace_step(bound_to_fake_groups(result.program)).gm
    first = next(node for node in gm.graph.nodes if node.target is EXCHANGE)
    wait = next(iter(first.users))
    between, node = [], first
    while node is not wait:
        between.append(node.target)
        node = node.next
    assert MATMULS & set(between)  # the next product, beside the first exchange
    cats = [node for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default) if _of_weights(node)]
    # of halves of rotary embedding, not of weights
    padded = gm.graph.find_nodes(op="call_function", target=aten.slice_backward.default)
    assert len(cats) >= 2 and all(node.meta["val"].dim() > 2 for node in padded)


def _of_weights(node: fx.Node) -> bool:
    """Whether gradients of parts of a weight are put together."""
    values = [source.meta["val"].shape for source in node.all_input_nodes]
    return len(values) == 3 and all(len(shape) >= 2 and shape[-1] == 32 for shape in values)
