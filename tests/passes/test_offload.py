"""Activations that wait in host memory change no bit of the result, and the device holds fewer of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from omnicompile.cluster import Cluster
from omnicompile.lowering.dry_run import dry_run, dry_run_program
from omnicompile.lowering.step_graph import trace_step
from omnicompile.passes import lower_forward
from omnicompile.passes.liveness import balanced_rows, peak_bytes, storage_of, tensor_bytes
from omnicompile.passes.offload import HOST_COPY
from omnicompile.passes.offload_op import FETCH, FETCH_WAIT, OFFLOAD, OFFLOAD_WAIT, host_empty_like
from omnicompile.passes.segments import is_forward
from omnicompile.plan import BlockPlan, Mesh, Plan
from omnicompile.recompute import Recompute
from omnicompile.workload import Workload

from .models import dense_model, text_batch
from .parity import captured_for, program_of, whole_values
from .steps import lowered, one_rank_step, run_on_all_ranks

LAYERS, TOKENS = 5, 256
SAVED = 2 * TOKENS * 64 * 4
COPIES = (OFFLOAD, OFFLOAD_WAIT, FETCH, FETCH_WAIT)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.sin())


class Stack(nn.Module):
    """Layers that each save two tensors of TOKENS x 64 float32, and a loss."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 64), nn.Linear(64, 20)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def stack_step(offload: bool, model: nn.Module | None = None) -> tuple[fx.GraphModule, list[Tensor]]:
    """The step graph on one rank, and arguments for it."""
    model, batch = model or Stack(), text_batch(0, TOKENS, vocab=20)
    captured, inputs = captured_for(model, batch)
    original = program_of(captured, model, Mesh(), {"text": BlockPlan(offload=offload)}, TOKENS)
    step = trace_step(lower_forward(original))
    values = whole_values(original, captured, model) | inputs.prepare(batch)
    names = [node.name for node in step.gm.graph.find_nodes(op="placeholder")]
    return step.gm, [values.get(name, torch.tensor(10.0)) for name in names]


def copies(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target in COPIES]


def test_two_layers_at_most_are_on_their_way() -> None:
    gm, _ = stack_step(True)
    short = {OFFLOAD: "out", OFFLOAD_WAIT: "out.", FETCH: "in", FETCH_WAIT: "in."}
    found = [short[node.target] for node in copies(gm)]
    outward = ["out", *["out.", "out"] * (LAYERS - 2), "out."]
    inward = ["in", *["in.", "in"] * (LAYERS - 2), "in."]
    assert found == outward + inward


def test_the_first_backward_keeps_its_tensors_and_a_layer_is_fetched_while_the_one_before_computes() -> None:
    gm, _ = stack_step(True)
    fetches = [node for node in copies(gm) if node.target is FETCH]
    launches = [node for node in copies(gm) if node.target is OFFLOAD]
    assert [node.args[0] for node in fetches] == launches[::-1]
    products = [node for node in gm.graph.nodes if node.target is torch.ops.aten.mm.default]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for fetch, wait in zip(fetches, [node for node in copies(gm) if node.target is FETCH_WAIT]):
        assert sum(order[fetch] < order[product] < order[wait] for product in products) == 2  # of the layer before


def test_nothing_saved_lives_on_the_device_between_forward_and_backward() -> None:
    gm, _ = stack_step(True)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    last = [node for node in copies(gm) if node.target is OFFLOAD_WAIT][-1]
    for node in copies(gm):
        if node.target is OFFLOAD:
            for source in node.args[0]:
                later = [user for user in source.users if order[user] > order[last]]
                assert later == [], "its last use is the wait"


def test_the_graph_gives_the_same_bits_and_holds_less() -> None:
    gm, arguments = stack_step(True)
    whole, same = stack_step(False)
    with torch.no_grad():
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(gm(*arguments), whole(*same), strict=True))
    saved = peak_bytes(whole).total - peak_bytes(gm).total
    assert saved >= (LAYERS - 3) * SAVED  # of the layers neither at work, nor coming, nor the last


def test_deeper_models_hold_no_more() -> None:
    peaks = []
    for layers in (5, 9):
        peak = peak_bytes(stack_step(True, Stack(layers))[0])
        gradients = layers * (64 * 64 + 64) * 4
        peaks.append(peak.beyond_inputs - gradients)
    assert peaks[0] == peaks[1]


def test_what_several_layers_read_stays_on_the_device() -> None:
    class Shared(Stack):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embed(input_ids)
            table = x.sigmoid()
            for layer in self.layers:
                x = layer(x) * table
            return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    gm, arguments = stack_step(True, Shared())
    whole, same = stack_step(False, Shared())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(gm(*arguments), whole(*same), strict=True))
    moved = {source.target for node in copies(gm) if node.target is OFFLOAD for source in node.args[0]}
    assert moved and torch.ops.aten.sigmoid.default not in moved


# Models ------------------------------------------------------------------------------------------------------------


SLOW = [pytest.param(policy, marks=pytest.mark.slow) for policy in list(Recompute)[1:]]


@pytest.mark.parametrize("policy", [Recompute.NONE, *SLOW])
def test_a_model_gives_the_same_bits_under_every_recompute_policy(policy: Recompute) -> None:
    step, arguments = one_rank_step("vlm", policy, offload=True)
    plain, same = one_rank_step("vlm", policy)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(step.gm(*arguments), plain.gm(*same), strict=True))
    assert copies(step.gm) and not copies(plain.gm)


def test_only_blocks_that_ask_for_it_and_no_parameters_go_to_the_host() -> None:
    _, program = lowered("vlm", Recompute.NONE, Mesh(dp_shard=2), offload=True)
    program.blocks["text"] = BlockPlan()
    gm = trace_step(program).gm
    launches = [node for node in copies(gm) if node.target is OFFLOAD]
    assert len(launches) > 2 and {node.meta["block"] for node in launches} == {"visual"}
    moved = {source for node in launches for source in node.args[0]}
    assert all(source.meta.get("role") != "param_gather" and is_forward(source) for source in moved)
    assert len({storage_of(source) for source in moved}) == len(moved)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param("vlm", Mesh(sp=2), marks=pytest.mark.slow),
        pytest.param("vlm", Mesh(dp_shard=2), marks=pytest.mark.slow),
        ("moe", Mesh(sp=2, ep=2)),
    ],
    ids=["vlm sp", "vlm fsdp", "moe sp ep"],
)
def test_ranks_give_the_same_bits(kind: str, mesh: Mesh) -> None:
    _, want = run_on_all_ranks(kind, Recompute.NONE, mesh)
    step, got = run_on_all_ranks(kind, Recompute.NONE, mesh, offload=True)
    assert copies(step.gm)
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_dry_run_counts_copies_and_what_they_save() -> None:
    runs = {}
    for offload in (False, True):
        _, program = lowered("vlm", Recompute.NONE, Mesh(dp_shard=2), offload)
        runs[offload] = dry_run_program(program, {}, Cluster(gpus=2))
    assert runs[True].peak_bytes < runs[False].peak_bytes
    assert runs[True].timeline.busy["copy"] > 0 and runs[False].timeline.busy["copy"] == 0
    kinds = runs[True].timeline.by_kind
    assert kinds["offload"] == pytest.approx(kinds["fetch"])
    assert runs[True].timeline.hidden["offload"] > 0 and runs[True].seconds >= runs[False].seconds


def test_the_dry_run_of_an_offloaded_optimizer_holds_compute_weights_and_gradients() -> None:
    runs = {}
    for offload in (False, True):
        plan = Plan(
            "m", Cluster(gpus=2), Workload(), Mesh(dp_shard=2), {"text": BlockPlan()}, offload_optimizer=offload
        )
        runs[offload] = dry_run(dense_model().to("meta"), text_batch(0), plan)
    device, host = runs[False], runs[True]
    assert host.optimizer_bytes == 0 and 2 * host.parameter_bytes == device.parameter_bytes
    assert device.peak_bytes - host.peak_bytes >= host.parameter_bytes
    assert host.update_seconds > device.update_seconds and host.collectives == device.collectives


# Host memory -------------------------------------------------------------------------------------------------------


def test_host_memory_of_a_cpu_is_none_of_the_process_s_own() -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    nbytes = 64 * 2**20
    value = torch.ones(nbytes // 4)
    before = anonymous()
    host = torch.ops.omnicompile.offload([value])
    assert torch.equal(host[0], value)
    del value
    assert anonymous() < before - 0.9 * nbytes
    (back,) = torch.ops.omnicompile.fetch(host, torch.device("cpu"))
    assert torch.equal(back, torch.ones(nbytes // 4)) and anonymous() > before - 0.1 * nbytes


def test_layouts_and_empty_tensors_come_back_as_they_went() -> None:
    values = [torch.randn(4, 6).t(), torch.zeros(0, 3), torch.arange(5), torch.randn(2, 3, 4).to(torch.bfloat16)]
    host = torch.ops.omnicompile.offload(values)
    back = torch.ops.omnicompile.fetch(host, torch.device("cpu"))
    for value, got in zip(values, back, strict=True):
        assert torch.equal(value, got) and (value.stride(), value.dtype) == (got.stride(), got.dtype)
    assert host_empty_like(values[0], torch.float64).dtype is torch.float64


def test_host_copies_take_no_memory_of_the_device() -> None:
    gm, _ = stack_step(True)
    rows = balanced_rows(gm.graph)
    for node in copies(gm):
        assert tensor_bytes(node.meta.get("val"), rows) == (0 if node.target is not FETCH else SAVED)
        assert node.meta["phase"] == HOST_COPY
