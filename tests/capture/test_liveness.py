import pytest
import torch
from torch import Tensor

from omnicompile.capture.liveness import analyse
from omnicompile.program import Phase, Recompute, Sym

from .small import TOKENS, WIDTH, Language, joint_of, program_of, reader, text

ROW = WIDTH * 4


def saved(function):
    joint = joint_of(function)
    return analyse(joint, reader(), {}, {}).saved


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
    everything = analyse(joint, reader(), {}, {}).saved[Recompute.NONE].nbytes
    first = next(n for n in joint.forward if str(n.target) == "aten.tanh.default")
    halved = analyse(joint, reader(), {}, {first: 2}).saved[Recompute.NONE].nbytes
    assert everything - halved == ROW * Sym.S / 2


def test_peaks_hold_no_registers() -> None:
    """Between two products a chain of pointwise work needs its source, and its result which is kept."""
    joint = joint_of(lambda x, w: (((x @ w).neg() + 1) * 2 - 3) @ w)
    assert analyse(joint, reader(), {}, {}).forward_peak.coeff(Sym.S) <= ROW


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
