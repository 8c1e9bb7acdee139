import torch
from torch import nn

from omnicompile.program import OpKind, Phase, Sym

from .small import TOKENS, WIDTH, Language, joint_of, ops_of, program_of

S = Sym.S


def of_kind(ops, kind, phase):
    return [op for op in ops if op.kind is kind and op.phase is phase]


def test_a_product_and_its_two_gradients() -> None:
    ops = ops_of(joint_of(lambda x, w: torch.tanh(x @ w) @ w))
    forward, backward = (of_kind(ops, OpKind.GEMM, p) for p in Phase)
    once = 2 * WIDTH * WIDTH * S
    assert [op.flops for op in forward] == [once, once]
    # The input needs no gradient: the first product has one for its weight only.
    assert [op.flops for op in backward] == [once] * 3
    weights = [op for op in backward if op.feeds == frozenset({"weight"})]
    assert len(weights) == 3  # all of them serve the weight, one of them through the inner input
    assert sorted(op.token_dim for op in backward) == ["k", "k", "m"]


def test_tokens_run_along_m_forward_and_k_in_weight_gradients() -> None:
    ops = ops_of(joint_of(lambda x, w: x @ w))
    (forward,), (backward,) = (of_kind(ops, OpKind.GEMM, p) for p in Phase)
    assert forward.gemm.m == S and forward.token_dim == "m"
    assert backward.gemm.k == S and backward.token_dim == "k"


def test_bytes_of_parameters_are_apart_from_activations() -> None:
    ops = ops_of(joint_of(lambda x, w: torch.tanh(x @ w)))
    (forward,), (backward,) = (of_kind(ops, OpKind.GEMM, p) for p in Phase)
    weight = WIDTH * WIDTH * 4
    assert (forward.param_bytes, forward.activation_bytes) == (weight, 2 * WIDTH * 4 * S)
    assert (backward.param_bytes, backward.activation_bytes) == (weight, 2 * WIDTH * 4 * S)


def test_a_convolution_of_patches() -> None:
    weight = nn.Parameter(torch.zeros(8, 3, 4, 4))
    images = torch.zeros(5, 3, 4 * TOKENS, 4)
    joint = joint_of(lambda x, w: nn.functional.conv2d(x, w, stride=4).tanh(), weight, inputs=images)
    ops = ops_of(joint)
    (forward,), (backward,) = (of_kind(ops, OpKind.GEMM, p) for p in Phase)
    assert forward.flops == backward.flops == 2 * 5 * S * 8 * 48  # no gradient of the pixels
    assert backward.param_bytes == 2 * weight.numel() * 4  # the weight is read, its gradient written
    assert not backward.activation_bytes.coeff(S, 0)


def test_attention_counts_pairs_of_the_sample() -> None:
    layer = program_of(Language()).segment("text.layers")
    (forward,), (backward,) = (of_kind(layer.ops, OpKind.ATTENTION, p) for p in Phase)
    assert forward.flops == 4 * WIDTH * Sym.S2
    assert backward.flops == 10 * WIDTH * Sym.S2
    assert forward.attention.causal and forward.attention.heads == 2


def test_gradients_of_norm_weights_are_parameter_bytes() -> None:
    layer = program_of(Language()).segment("text.layers")
    for op in layer.phase_ops(Phase.BACKWARD):
        assert not op.activation_bytes.coeff(S, 0), op.name


def test_many_small_products_run_along_their_batch() -> None:
    ops = ops_of(joint_of(lambda x, w: torch.bmm(x.transpose(0, 1), x.transpose(0, 1).transpose(1, 2)) * w.sum()))
    product = of_kind(ops, OpKind.GEMM, Phase.FORWARD)[0]
    assert product.flops == 2 * WIDTH * S
    assert product.gemm.m * product.gemm.batch == S and product.token_dim == "m"


def test_an_embedding_moves_the_rows_it_looks_up() -> None:
    (op,) = [op for op in program_of(Language()).segment("text.embed").ops if op.phase is Phase.FORWARD]
    assert op.activation_bytes == 2 * WIDTH * 4 * S
    assert op.param_bytes == 0
