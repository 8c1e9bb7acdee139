"""Logits of several losses exist one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from omnicompile.lowering.driver import with_outputs
from omnicompile.lowering.graph_capture import LoweredInputs
from omnicompile.lowering.step_graph import StepGraph, trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.late_losses import late_losses_pass
from omnicompile.passes.liveness import peak_bytes
from omnicompile.passes.segments import FORWARD
from omnicompile.plan import BlockPlan, Layout, Mesh, Sharding

from .models import dense_model, text_batch
from .parity import captured_for, program_of

ROWS, WIDTH, WORDS = 16, 8, 64


def two_losses(h: Tensor, a: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(h @ a.t(), targets) + F.cross_entropy((h * 2) @ b.t(), targets)


def one_loss(h: Tensor, a: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(h @ a.t() + 0 * (h @ b.t()), targets)


def read_at_once(h: Tensor, a: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    """The backward of the second loss needs the first one."""
    return F.cross_entropy(h @ a.t(), targets) * F.cross_entropy((h * 2) @ b.t(), targets)


def arguments() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(ROWS, WIDTH), torch.randn(WORDS, WIDTH), torch.randn(WORDS, WIDTH), torch.arange(ROWS)]


def traced(loss) -> fx.GraphModule:
    """Loss and gradients, the nodes of the forward marked."""
    forward: list[int] = []

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
        found = loss(*leaves)
        forward.append(1)
        return (found.detach(), *torch.autograd.grad(found, leaves[:3]))

    gm = make_fx(step)(*arguments())
    begins = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.ones_like.default)
    for node in gm.graph.nodes:
        if node is begins:
            break
        node.meta["phase"] = FORWARD
    return gm


def shape_of(gm: fx.GraphModule) -> str:
    """The order of products, softmaxes (s) and their backward (d)."""
    names = {torch.ops.aten.mm.default: "m", torch.ops.aten._log_softmax.default: "s",
             torch.ops.aten._log_softmax_backward_data.default: "d"}  # fmt: skip
    return "".join(names.get(node.target, "") for node in gm.graph.nodes)


def test_the_first_loss_moves_to_its_backward() -> None:
    gm = traced(two_losses)
    want, before = gm(*arguments()), peak_bytes(gm)
    assert {"_log_softmax", "_log_softmax_1"} <= before.holders.keys()
    assert shape_of(gm) == "msms" + "dmm" + "dmm"
    assert late_losses_pass(gm) == 1
    assert shape_of(gm) == "ms" + "dmm" + "ms" + "dmm"
    assert all(torch.equal(a, b) for a, b in zip(gm(*arguments()), want, strict=True))
    after = peak_bytes(gm)
    assert after.total < before.total and not {"_log_softmax", "_log_softmax_1"} <= after.holders.keys()


def test_the_weight_is_made_where_it_is_read() -> None:
    gm = traced(two_losses)
    late_losses_pass(gm)
    product = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[3]
    between = [node.op for node in product.all_input_nodes[1].all_input_nodes]
    assert between == ["placeholder"] or product.all_input_nodes[1].next is product


@pytest.mark.parametrize("loss", [one_loss, read_at_once])
def test_what_would_gain_nothing_stays(loss) -> None:
    gm = traced(loss)
    before = shape_of(gm)
    assert late_losses_pass(gm) == 0 and shape_of(gm) == before


class TwoHeads(nn.Module):
    """The head of the words first, as models that generate images have it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = dense_model(1)
        torch.manual_seed(1)
        self.codes = nn.Linear(32, 16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.base.model(input_ids=input_ids).last_hidden_state
        text = self.base.loss_function(self.base.lm_head(hidden), labels, vocab_size=128)
        return text + F.cross_entropy(self.codes(hidden).flatten(0, 1), labels.flatten() % 16)


def step_of(model: nn.Module, mesh: Mesh) -> tuple[StepGraph, LoweredInputs]:
    captured, inputs = captured_for(model, text_batch(0))
    block = BlockPlan(Sharding.FSDP, Layout.BATCH)
    program = program_of(with_outputs(captured, ("loss",)), model, mesh, {"text": block}, 64)
    return trace_step(lower_forward(program)), inputs


def test_a_step_of_a_model_with_two_heads() -> None:
    model, batch = TwoHeads(), text_batch(0)
    step, inputs = step_of(model, Mesh())
    assert shape_of(step.gm).count("s") == 2
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    named = {f"{p}_model_{name.replace('.', '_')}": value for name, value in tensors.items() for p in "pb"}
    values = named | inputs.prepare(batch)
    counts = {"num_targets": int((batch["labels"][:, 1:] != -100).sum()), "num_targets_1": batch["labels"].numel()}
    values |= {name: torch.tensor(float(number)) for name, number in counts.items()}
    order = [node.name for node in step.gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        loss, *found = step.gm(*(values[name] for name in order))
    want = model(**batch)
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    for name, gradient in zip(step.gradients, found, strict=True):
        torch.testing.assert_close(gradient, named[name].grad, rtol=1e-5, atol=1e-6)


def test_the_heads_of_a_rank_follow_each_other() -> None:
    """Also with parameters that are gathered ahead of use."""
    order = shape_of(step_of(TwoHeads(), Mesh(dp_shard=2))[0].gm)
    assert order.count("s") == order.count("d") == 2
    assert order.index("d") < order.rindex("s"), order
