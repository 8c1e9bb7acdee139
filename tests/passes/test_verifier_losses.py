"""Several losses, one of them no sum over tokens: what is broken in any of them is named at its node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from omnicompile.errors import VerificationError
from omnicompile.lowering.driver import with_outputs
from omnicompile.passes import collectives, lower_forward
from omnicompile.passes.loss import is_mean_loss
from omnicompile.passes.propagate import module_of
from omnicompile.passes.rank_program import RankProgram
from omnicompile.passes.verifier import verify_lowering
from omnicompile.plan import Mesh

from .models import block_plans, mixture_model, text_batch
from .parity import captured_for, program_of, shifted_targets, whole_values

aten = torch.ops.aten
KINDS, EXPERTS, CHOSEN = 8, 4, 2
MESH = Mesh(dp_shard=2, sp=2)


class SeveralLosses(nn.Module):
    """Next tokens, and the kind of the document. three: easy texts count less, and experts shall be used alike."""

    def __init__(self, three: bool) -> None:
        super().__init__()
        self.base, self.three = mixture_model(layers=1), three
        torch.manual_seed(1)
        self.head = nn.Linear(32, KINDS)

    def forward(self, input_ids: Tensor, labels: Tensor, kind_labels: Tensor) -> dict[str, Tensor]:
        found = self.base.model(input_ids=input_ids, output_router_logits=True)
        hidden = found.last_hidden_state
        text = self.base.loss_function(self.base.lm_head(hidden), labels, vocab_size=128)
        kind = F.cross_entropy(self.head(hidden.mean(1)), kind_labels)
        if not self.three:
            return {"loss": text + 0.5 * kind}
        balance = load_balancing_loss_func(found.router_logits, EXPERTS, CHOSEN)
        return {"loss": text * (1 - torch.exp(-text)) + 0.5 * kind + 0.1 * balance}


@dataclass(frozen=True)
class Case:
    """text, kind: the cross-entropies. total: the loss. All of the original graph."""

    program: RankProgram
    values: dict[str, Tensor]
    targets: tuple[int, int]
    text: fx.Node
    kind: fx.Node
    total: fx.Node

    @property
    def balance(self) -> fx.Node:
        """The third loss before its weight."""
        return self.total.all_input_nodes[-1].all_input_nodes[0]

    @property
    def product(self) -> fx.Node:
        """Of the two means that the third loss multiplies."""
        return self.balance.all_input_nodes[0].all_input_nodes[0]

    def refusal(self, change: Callable[[RankProgram], None]) -> str:
        """What the verifier says of the lowered program after `change`."""
        broken = lower_forward(self.program)
        change(broken)
        broken.gm.graph.lint()
        broken.gm.recompile()
        with pytest.raises(VerificationError) as caught:
            verify_lowering(self.program, broken, self.values, self.targets)
        return str(caught.value)


@lru_cache(maxsize=3)
def case_of(three: bool, mesh: Mesh = MESH) -> Case:
    model, batch = SeveralLosses(three), text_batch(0, length=16) | {"kind_labels": torch.tensor([3])}
    captured, inputs = captured_for(model, batch)
    captured = with_outputs(captured, ("loss",))
    program = program_of(captured, model, mesh, block_plans(mesh), 16)
    text, kind = (node for node in program.gm.graph.nodes if is_mean_loss(node))
    values = whole_values(program, captured, model) | inputs.prepare(batch)
    return Case(program, values, (shifted_targets(batch), 1), text, kind, program.output_nodes()[0])


def reduction_before(reader: str, role: str = "sp_all_reduce", number: int = 0) -> Callable[[RankProgram], None]:
    """Drops a reduction that the node called `reader` reads, straight or through another."""

    def change(program: RankProgram) -> None:
        (node,) = (n for n in program.gm.graph.nodes if n.name == reader)
        source = node.all_input_nodes[number]
        while source.meta["role"] != role:
            (source,) = source.all_input_nodes
        assert source.target is collectives.all_reduce
        source.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]
        program.gm.graph.erase_node(source)

    return change


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return x * factor + x.detach() * (1 - factor)


def gradient_behind(name: str, factor: float) -> Callable[[RankProgram], None]:
    """Scales the gradient that comes back to the node called `name`."""

    def change(program: RankProgram) -> None:
        (node,) = (n for n in program.gm.graph.nodes if n.name == name)
        with program.gm.graph.inserting_after(node):
            scaled = program.gm.graph.call_function(scaled_gradient, (node, factor))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    return change


def named(node: fx.Node) -> str:
    return f"{node.name} in {module_of(node)}: the ranks hold neither the whole value, nor pieces of it, nor summands"


@pytest.mark.parametrize("three", [False, True])
def test_several_losses_are_accepted(three: bool) -> None:
    case = case_of(three)
    report = verify_lowering(case.program, lower_forward(case.program), case.values, case.targets)
    assert report.nodes > 80 and report.worst[1] < 1e-5


def test_a_sum_that_is_missing_behind_a_loss() -> None:
    """Summands of the loss of the text meet a function that is not linear."""
    case = case_of(True)
    (exp,) = (node for node in case.program.gm.graph.nodes if node.target is aten.exp.default)
    said = case.refusal(reduction_before(exp.name))
    assert said.startswith(named(exp)) and f"they hold summands of {exp.args[0].name}: the losses of all" in said


@pytest.mark.parametrize("three", [False, True])
def test_a_sum_that_is_missing_before_a_loss(three: bool) -> None:
    """Each rank has the mean of its own tokens only."""
    case = case_of(three)
    head = case.kind.all_input_nodes[0]
    said = case.refusal(reduction_before(head.name))
    assert said.startswith(named(head)) and said.endswith(f"they hold summands of {head.args[0].name}")


@pytest.mark.parametrize("number", [0, 1])
def test_a_sum_that_is_missing_in_a_loss_of_products(number: int) -> None:
    """The product of one mean with summands of the other is itself summands: they leak where the loss is taken for
    whole."""
    case = case_of(True)
    said = case.refusal(reduction_before(case.product.name, number=number))
    weighted = case.total.all_input_nodes[-1]
    assert said.startswith(named(case.total)) and f"{weighted.name}: the losses of all ranks add up" in said


def test_a_mean_over_data_ranks_that_is_missing() -> None:
    case = case_of(True, Mesh(dp_shard=3, sp=2))
    said = case.refusal(reduction_before(case.product.name, "data_all_reduce"))
    assert said.startswith(named(case.product))


def test_a_share_that_is_missing() -> None:
    """The loss of the document's kind is whole on every rank, and would be counted on each."""
    case = case_of(False)

    def whole(program: RankProgram) -> None:
        (total,) = (node for node in program.gm.graph.nodes if node.name == case.total.name)
        share = total.all_input_nodes[1]
        assert share.target is collectives.share
        total.replace_input_with(share, share.all_input_nodes[0])

    said = case.refusal(whole)
    assert said.startswith(named(case.total)) and "the losses of all ranks add up to" in said


@pytest.mark.parametrize("factor", [2.0, 1.0 / MESH.sp])
@pytest.mark.parametrize(
    "three, which",
    [
        (True, "text"),
        (True, "kind"),
        (True, "balance"),
        pytest.param(False, "text", marks=pytest.mark.slow),
        pytest.param(False, "kind", marks=pytest.mark.slow),
    ],
)
def test_a_gradient_scaled_wrongly(three: bool, which: str, factor: float) -> None:
    """Also where each rank has then as much as it should of another placement."""
    case = case_of(three)
    nodes = {"text": case.text, "kind": case.kind} | ({"balance": case.balance} if three else {})
    node = nodes[which]
    said = case.refusal(gradient_behind(node.name, factor))
    readers = ", ".join(user.name for user in node.users)
    wanted = f"is missing, doubled or scaled between {node.name} in {module_of(node)} and what reads it ({readers})"
    assert said.startswith("the gradient of ") and said.endswith(wanted)


@pytest.mark.slow
def test_a_gradient_scaled_wrongly_inside_the_model() -> None:
    case = case_of(False)
    (norm,) = case.text.args[0].all_input_nodes[0].all_input_nodes[0].all_input_nodes[:1]  # type: ignore[union-attr]
    said = case.refusal(gradient_behind(norm.name, 0.5))
    assert f"scaled between {norm.name} in {module_of(norm)} and what reads it" in said
