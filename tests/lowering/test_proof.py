"""A proof finds equal programs equal, and others not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from omnicompile.cluster import Cluster
from omnicompile.errors import LoweringError, OmniCompileError, PlanError
from omnicompile.lowering.proof import joined, prove, relative_errors
from omnicompile.lowering.proof_plan import count_experts, default_plan, reduced_plan, with_choices
from omnicompile.lowering.tiny import TinyModel
from omnicompile.plan import BlockPlan, Layout, Mesh, Plan
from omnicompile.workload import Workload
from tests.passes.models import dense_model, mixture_model, text_batch


def _tiny(model: nn.Module) -> TinyModel:
    return TinyModel(model, text_batch)


def _plan(mesh: Mesh) -> Plan:
    block = BlockPlan(layout=Layout.SEQUENCE if mesh.sp > 1 else Layout.BATCH, sp=mesh.sp, ep=mesh.ep)
    return Plan("m", Cluster(gpus=mesh.world), Workload(), mesh, {"text": block})


def test_a_mixture_on_four_ranks_equals_one_process() -> None:
    tiny = _tiny(mixture_model())
    report = prove(tiny, default_plan(tiny.model, tiny.batch(0), 4))
    assert report.equal, (report.worst, report.verdict)
    assert report.plan.mesh == Mesh(dp_shard=2, sp=2, ep=2)
    assert report.collectives[("dispatch", "ep")] == 2 and report.nodes > 50


def test_a_dropped_reduction_is_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    import omnicompile.lowering.proof as proof

    def faulty(program: object) -> object:
        lowered = real(program)  # type: ignore[arg-type]
        lowered.params = {name: replace(spec, reduce_axes=()) for name, spec in lowered.params.items()}
        return lowered

    real = proof.lower_forward
    monkeypatch.setattr(proof, "lower_forward", faulty)
    tiny = _tiny(dense_model())
    plan = with_choices(_plan(Mesh(dp_shard=2)), {}, {"text": {"sharding": "replicate"}}, 0)
    report = proof.prove(tiny, plan)
    assert not report.equal and report.worst[1] > 0.01 and "gradient" in report.verdict


@pytest.mark.parametrize(
    ("mesh", "gpus", "wanted"),
    [
        (Mesh(dp_replicate=4, dp_shard=8, sp=4), 8, Mesh(dp_replicate=2, dp_shard=2, sp=2)),
        (Mesh(dp_shard=128), 8, Mesh(dp_shard=8)),
        (Mesh(dp_shard=16, sp=8, ep=16), 4, Mesh(dp_shard=2, sp=2, ep=2)),
    ],
)
def test_the_mesh_keeps_its_shape(mesh: Mesh, gpus: int, wanted: Mesh) -> None:
    reduced = reduced_plan(_plan(mesh), gpus, experts=8)
    assert reduced.mesh == wanted and reduced.blocks["text"].sp == wanted.sp


def test_meshes_that_cannot_be_reduced_are_refused() -> None:
    with pytest.raises(LoweringError, match="cannot be reduced to 3"):
        reduced_plan(_plan(Mesh(dp_shard=4)), 3, 0)
    with pytest.raises(PlanError, match="does not make up 4"):
        with_choices(_plan(Mesh(dp_shard=4)), {"sp": 3}, {}, 0)


def test_experts_are_counted() -> None:
    assert count_experts(mixture_model()) == 4 and count_experts(dense_model()) == 0


def test_position_ids_join_along_their_rows() -> None:
    batch = {"position_ids": torch.zeros(3, 1, 4), "input_ids": torch.zeros(1, 4), "flag": True}
    whole = joined([batch, batch])
    assert (whole["position_ids"].shape, whole["input_ids"].shape, whole["flag"]) == ((3, 2, 4), (2, 4), True)


def test_errors_are_relative_to_the_gradient_or_the_whole() -> None:
    want = {"a": torch.ones(4), "zero": torch.zeros(4)}
    errors = relative_errors({"a": torch.ones(4) * 1.01, "zero": torch.full((4,), 1e-9)}, want)
    assert errors["a"] == pytest.approx(0.01, rel=1e-3) and errors["zero"] == pytest.approx(1e-3, rel=1e-3)


def test_batches_of_one_shape_are_proved_where_others_are_refused() -> None:
    def batch(rank: int) -> dict[str, torch.Tensor]:
        return text_batch(rank, 64 if rank == 0 else 32)

    plan = _plan(Mesh(dp_shard=2))
    with pytest.raises(OmniCompileError):
        prove(TinyModel(dense_model(), batch), plan, check_values=False)
    report = prove(TinyModel(dense_model(), batch, even=text_batch), plan, check_values=False)
    assert report.equal and any("one shape" in note for note in report.notes)


def test_a_block_that_the_model_lacks_is_named() -> None:
    tiny, plan = _tiny(dense_model()), _plan(Mesh(dp_shard=2))
    plan = replace(plan, blocks={"texd": plan.blocks["text"]})
    with pytest.raises(PlanError, match=r"a block 'texd', which .* \(did you mean text\?\), and none for 'text'"):
        prove(tiny, plan)
