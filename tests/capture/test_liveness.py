import pytest
import torch
from torch import Tensor

from omnicompile.capture.backward_points import POINTS, Corner, corners, launches_end
from omnicompile.capture.classify import MATMULS
from omnicompile.capture.liveness import analyse
from omnicompile.program import Phase, Recompute, Sym

from .small import TOKENS, WIDTH, Language, joint_of, program_of, reader, text

ROW = WIDTH * 4


def saved(function):
    joint = joint_of(function)
    return analyse(joint, reader(), {}, {}, ()).saved


def test_a_product_keeps_its_input() -> None:
    # x itself needs no gradient and flows in: the first product's input is not counted, the second's is.
    kept = saved(lambda x, w: (x @ w).tanh() @ w)
    assert kept[Recompute.NONE].nbytes == ROW * Sym.S


def test_selective_keeps_what_is_dear_and_recomputes_the_rest() -> None:
    kept = saved(lambda x, w: ((x @ w).exp().sigmoid().tanh()) @ w)
    assert kept[Recompute.NONE].nbytes == 3 * ROW * Sym.S
    assert kept[Recompute.SELECTIVE].nbytes == ROW * Sym.S


def test_full_keeps_the_input_of_a_layer_alone() -> None:
    layer = program_of(Language()).segment("text.layers")
    assert layer.saved[Recompute.FULL].nbytes == layer.input_bytes == ROW * Sym.S
    assert len(layer.saved[Recompute.FULL].recompute_ops) > 4


def test_all_but_attention_keeps_the_input_and_what_attention_gives() -> None:
    """Of attention its result (a row as wide as the layer) and, in float32, a log-sum-exp per head and token."""
    layer = program_of(Language()).segment("text.layers")
    full, most = layer.saved[Recompute.FULL], layer.saved[Recompute.EXCEPT_ATTENTION]
    heads = next(op.attention.heads for op in layer.ops if op.attention is not None)
    assert most.nbytes == full.nbytes + (ROW + 4 * heads) * Sym.S
    attention = {op.name for op in layer.ops if op.attention is not None and op.phase is Phase.FORWARD}
    assert set(full.recompute_ops) - set(most.recompute_ops) == attention


def test_frozen_parameters_need_less() -> None:
    layer = program_of(Language()).segment("text.layers")
    for kept in layer.saved.values():
        assert kept.nbytes_frozen.coeff(Sym.S) <= kept.nbytes.coeff(Sym.S)
    none = layer.saved[Recompute.NONE]
    assert none.nbytes_frozen.coeff(Sym.S) < none.nbytes.coeff(Sym.S)


def test_policies_are_ordered() -> None:
    for segment in program_of(Language()).segments:
        kept = [segment.saved[p].nbytes.subs(Sym.S, 997) for p in Recompute]
        assert kept == sorted(kept, reverse=True), segment.name


def test_what_all_layers_read_is_kept_once() -> None:
    """A decoder's layers all keep the encoder's output: it is one tensor."""
    joint = joint_of(lambda x, w: ((x @ w).tanh() @ w).tanh() @ w)
    everything = analyse(joint, reader(), {}, {}, ()).saved[Recompute.NONE].nbytes
    first = next(n for n in joint.forward if str(n.target) == "aten.tanh.default")
    halved = analyse(joint, reader(), {}, {first: 2}, ()).saved[Recompute.NONE].nbytes
    assert everything - halved == ROW * Sym.S / 2


def test_peaks_hold_no_registers() -> None:
    """Between two products a chain of pointwise work needs its source, and its result which is kept."""
    joint = joint_of(lambda x, w: (((x @ w).neg() + 1) * 2 - 3) @ w)
    assert analyse(joint, reader(), {}, {}, ()).forward_peak.coeff(Sym.S) <= ROW


def test_the_points_of_a_backward_trade_activations_for_gradients() -> None:
    """While gradients of parameters come into being, what the forward saved goes; experts' are told apart."""
    for segment in program_of(Language()).segments:
        points = segment.backward
        assert 1 <= len(points) <= POINTS
        held = [(point.temporaries - point.freed).subs(Sym.S, 997) for point in points]
        made = [point.dense for point in points]
        assert held == sorted(held, reverse=True) and made == sorted(made), segment.name
        assert held[0] >= 0 and all(0 <= point.dense <= 1 for point in points)


def test_what_goes_into_compiled_code_is_held_until_it_returns() -> None:
    """Nothing is freed within a stretch without attention or experts between."""
    joint = joint_of(lambda x, w: ((x @ w).exp() @ w).sigmoid() @ w)
    points = analyse(joint, reader(), {}, {}, ()).backward
    assert all(point.freed == 0 for point in points) and points[-1].dense == 1.0


def test_a_stretch_ends_where_the_neighbours_collectives_are_launched() -> None:
    """After the first weight gradient and the product beside it; each weight here has one."""
    joint = joint_of(lambda x, w: ((x @ w).exp() @ w).sigmoid() @ w)
    calls = [node for node in joint.backward if node.op == "call_function"]
    products = [index for index, node in enumerate(calls) if node.target in MATMULS]
    ends = [len(calls) - 1] * len(calls)
    cut = launches_end(calls, ends, {calls[products[0]]})
    end = cut[0]
    assert products[1] <= end < products[2] and end < len(calls) - 1
    assert cut == [end] * (end + 1) + ends[end + 1 :]
    assert launches_end(calls, ends, ()) == ends


def test_a_kernel_holds_what_it_reads_until_all_its_results_are_there() -> None:
    """Of a gate: while the gradients of both its factors come into being, so does what they are made of live."""
    joint = joint_of(lambda x, w: (torch.nn.functional.silu(x @ w) * (x @ w)) @ w)
    first = analyse(joint, reader(), {}, {}, ()).backward[0]
    assert first.temporaries.coeff(Sym.S) == 3 * ROW


def test_what_runs_again_is_there_from_its_first_use_to_its_last() -> None:
    """Two chains between products: while the later one's backward runs, what the earlier one's needs is not there."""
    joint = joint_of(lambda x, w: ((x @ w).exp().sigmoid() @ w).exp().sigmoid() @ w)
    found = analyse(joint, reader(), {}, {}, ())
    kept, selective = (found.saved[p].nbytes.coeff(Sym.S) for p in (Recompute.NONE, Recompute.SELECTIVE))
    assert (kept, selective) == (4 * ROW, 2 * ROW)
    first = found.backward[0]
    assert first.freed == 0
    assert first.held(Recompute.SELECTIVE).freed.coeff(Sym.S) >= ROW
    assert first.held(Recompute.NONE).freed == first.freed
    most = {
        p: max((saved.nbytes * 0 + found.saved[Recompute.NONE].nbytes + h.temporaries - h.freed).coeff(Sym.S)
               for h in (point.held(p) for point in found.backward))
        for p, saved in found.saved.items()
    }  # fmt: skip
    assert most[Recompute.SELECTIVE] < most[Recompute.NONE]


def test_corners_are_the_upper_right_of_the_hull() -> None:
    def corner(x: float, y: float) -> Corner:
        return Corner(frozenset(), (), (y, 0.0), x, y)

    found = [corner(*xy) for xy in ((10, 0), (9, 1), (7, 7), (8, 3), (2, 8), (1, 9), (0, 9))]
    kept = [(c.x, c.y) for c in corners(found)]
    assert kept == [(10, 0), (7, 7), (1, 9)]
    for weight in (0.1, 0.5, 1.0, 2.0, 10.0):
        assert max(x + weight * y for x, y in kept) == max(c.x + weight * c.y for c in found)


def test_what_is_kept_is_what_eager_autograd_keeps() -> None:
    """The bytes of all distinct tensors, parameters and inputs left out, that autograd saves in a real forward."""
    model, batch = Language(), text()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch.values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch)
    program = program_of(model)
    expected = sum(s.saved[Recompute.NONE].nbytes.subs(Sym.S, TOKENS) * s.count for s in program.segments)
    assert float(expected) == pytest.approx(sum(kept.values()), rel=0.02)
    assert loss.requires_grad
