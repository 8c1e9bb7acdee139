import torch

from omnicompile.program import OpKind, Phase, Sym

from .small import TOKENS, WIDTH, joint_of, ops_of

ROW = WIDTH * 4  # bytes of a token in float32


def memory(joint, phase):
    return [op for op in ops_of(joint) if op.kind is OpKind.MEMORY and op.phase is phase]


def test_a_chain_of_pointwise_work_is_one_kernel() -> None:
    joint = joint_of(lambda x, w: ((x @ w).relu() * 2 + 1).tanh() @ w)
    (kernel,) = memory(joint, Phase.FORWARD)[:1]
    # Reads the product and writes the result; both are kept, and what lies between is never in memory.
    assert kernel.activation_bytes <= 3 * ROW * Sym.S
    assert sum(op.activation_bytes for op in memory(joint, Phase.FORWARD)[:-1]) <= 3 * ROW * Sym.S


def test_products_are_kernels_of_their_own() -> None:
    joint = joint_of(lambda x, w: (x @ w) @ w)
    assert len([op for op in ops_of(joint) if op.kind is OpKind.GEMM and op.phase is Phase.FORWARD]) == 2


def test_a_view_costs_nothing() -> None:
    plain = joint_of(lambda x, w: (x @ w).relu())
    viewed = joint_of(lambda x, w: (x @ w).transpose(1, 2).unsqueeze(0).relu())
    cost = [sum(op.activation_bytes for op in memory(j, Phase.FORWARD)) for j in (plain, viewed)]
    assert cost[0] == cost[1]


def test_writes_into_parts_of_one_buffer_are_one_pass() -> None:
    def gather(x, w):
        buffer = torch.zeros(TOKENS, WIDTH)
        for start in range(0, 900, 100):
            buffer[start : start + 100] = x[0, start : start + 100].detach()
        return buffer @ w

    total = sum(op.activation_bytes for op in memory(joint_of(gather), Phase.FORWARD))
    assert total.subs(Sym.S, TOKENS) < 12 * ROW * TOKENS * 2


def test_norm_backward_is_not_split_by_what_it_reads() -> None:
    """Work on saved values that only the backward's own kernel reads is part of that kernel."""

    def rms(x, w):
        y = x @ w
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)) @ w

    joint = joint_of(rms)
    kernels = memory(joint, Phase.BACKWARD)
    assert len(kernels) == len([k for k in kernels if k.activation_bytes.coeff(Sym.S) <= 6 * ROW])
    assert sum(k.activation_bytes for k in kernels).coeff(Sym.S) <= 10 * ROW
