"""Programs made by hand: a dense language model, vision-language models, mixtures of experts, random small ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import sympy

from omnicompile.program import (
    AttentionShape,
    BackwardPoint,
    Block,
    Edge,
    ExpertsShape,
    Expr,
    GemmShape,
    Op,
    OpKind,
    Param,
    Phase,
    Program,
    Recompute,
    Run,
    SampleShape,
    Saved,
    Segment,
    Sym,
)

ZERO = sympy.Integer(0)
WEIGHT, INPUT = frozenset({"weight"}), frozenset({"input"})


@dataclass(frozen=True)
class Stack:
    """A transformer stack. tokens: rows; pairs: attention pairs. experts = 0: dense. fused: one product makes query,
    key and value."""

    block: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    tokens: Expr
    pairs: Expr
    causal: bool
    experts: int = 0
    top_k: int = 0
    gated: bool = True
    fused: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def gemm(name: str, tokens: Expr, n: int, k: int) -> list[Op]:
    """A linear layer: forward, input gradient, weight gradient."""
    flops = 2 * tokens * n * k
    acts, weight = 2 * tokens * (n + k), sympy.Integer(2 * n * k)

    def op(suffix: str, phase: Phase, shape: GemmShape, token_dim: str, feeds: frozenset[str]) -> Op:
        return Op(
            name + suffix,
            "linear",
            OpKind.GEMM,
            phase,
            name,
            flops,
            acts,
            weight,
            shape,
            token_dim=token_dim,
            feeds=feeds,
        )

    n_, k_ = sympy.Integer(n), sympy.Integer(k)
    return [
        op("", Phase.FORWARD, GemmShape(tokens, n_, k_), "m", frozenset()),
        op(".dx", Phase.BACKWARD, GemmShape(tokens, k_, n_), "m", INPUT),
        op(".dw", Phase.BACKWARD, GemmShape(n_, k_, tokens), "k", WEIGHT),
    ]


def memory_op(name: str, nbytes: Expr) -> list[Op]:
    both = WEIGHT | INPUT
    return [
        Op(name, "norm", OpKind.MEMORY, Phase.FORWARD, name, ZERO, nbytes, ZERO),
        Op(name + ".b", "norm", OpKind.MEMORY, Phase.BACKWARD, name, ZERO, 2 * nbytes, ZERO, feeds=both),
    ]


def attention_ops(stack: Stack) -> list[Op]:
    dim = stack.head_dim
    shape = AttentionShape(stack.heads, stack.kv_heads, dim, dim, stack.tokens, stack.tokens, stack.pairs, stack.causal)
    flops = 4 * stack.pairs * stack.heads * dim
    acts = 2 * stack.tokens * dim * (2 * stack.heads + 2 * stack.kv_heads)

    def op(name: str, phase: Phase, factor: sympy.Expr, feeds: frozenset[str]) -> Op:
        return Op(
            name, "attn", OpKind.ATTENTION, phase, "attn", factor * flops, acts, ZERO, attention=shape, feeds=feeds
        )

    return [
        op("attn", Phase.FORWARD, sympy.Integer(1), frozenset()),
        op("attn.b", Phase.BACKWARD, sympy.Rational(5, 2), WEIGHT | INPUT),
    ]


def expert_ops(stack: Stack) -> list[Op]:
    shape = ExpertsShape(stack.experts, stack.top_k, stack.hidden, stack.intermediate, stack.tokens)
    flops = 6 * stack.tokens * stack.top_k * stack.hidden * stack.intermediate
    acts = 2 * stack.tokens * stack.top_k * (2 * stack.hidden + 3 * stack.intermediate)
    params = sympy.Integer(6 * stack.experts * stack.hidden * stack.intermediate)

    def op(name: str, phase: Phase, feeds: frozenset[str]) -> Op:
        return Op(
            name, "experts", OpKind.GROUPED_GEMM, phase, "experts", flops, acts, params, experts=shape, feeds=feeds
        )

    return [
        op("experts", Phase.FORWARD, frozenset()),
        op("experts.dx", Phase.BACKWARD, INPUT),
        op("experts.dw", Phase.BACKWARD, WEIGHT),
    ]


def interleave(forward_order: list[list[Op]]) -> tuple[Op, ...]:
    """Forward ops in order, then the backward in reverse."""
    forward = [op for group in forward_order for op in group if op.phase is Phase.FORWARD]
    backward = [op for group in reversed(forward_order) for op in group if op.phase is Phase.BACKWARD]
    return (*forward, *backward)


def saved_by_policy(everything: Expr, results: Expr, inputs: Expr, ops: tuple[Op, ...]) -> dict[Recompute, Saved]:
    forward = [op for op in ops if op.phase is Phase.FORWARD]
    cheap = tuple(op.name for op in forward if op.kind is OpKind.MEMORY)
    return {
        Recompute.NONE: Saved(everything, everything / 2),
        Recompute.SELECTIVE: Saved(results, results / 2, cheap),
        Recompute.EXCEPT_ATTENTION: Saved(
            (inputs + results) / 2, inputs, tuple(op.name for op in forward if op.kind is not OpKind.ATTENTION)
        ),
        Recompute.FULL: Saved(inputs, inputs, tuple(op.name for op in forward)),
    }


def layer_segment(stack: Stack) -> Segment:
    t, h, i = stack.tokens, stack.hidden, stack.intermediate
    kv = stack.kv_heads * stack.head_dim
    apart = [gemm("q", t, h, h), gemm("k", t, kv, h), gemm("v", t, kv, h)]
    projections = [gemm("qkv", t, h + 2 * kv, h)] if stack.fused else apart
    groups = [
        memory_op("norm1", 4 * t * h),
        *projections,
        attention_ops(stack),
        gemm("o", t, h, h),
        memory_op("norm2", 6 * t * h),
    ]
    params = [Param("qkv", (h + 2 * kv, h)), Param("o", (h, h)), Param("norm", (2 * h,))]
    if stack.experts:
        groups += [gemm("router", t, stack.experts, h), expert_ops(stack)]
        params += [Param("router", (stack.experts, h)), Param("experts", (stack.experts, 3 * i, h), expert=True)]
        wide = stack.top_k * i
    else:
        groups += [gemm("up", t, 2 * i, h), memory_op("act", 6 * t * i), gemm("down", t, h, i)]
        params += [Param("up", (2 * i, h)), Param("down", (h, i))]
        wide = i
    ops = interleave(groups)
    saved = saved_by_policy(2 * t * (8 * h + 3 * wide), 2 * t * (5 * h + 2 * wide), 2 * t * h, ops)
    return Segment(
        name=f"{stack.block}.layers",
        block=stack.block,
        role="layer",
        count=stack.layers,
        paths=tuple(f"{stack.block}.layers.{n}" for n in range(stack.layers)),
        params=tuple(params),
        ops=ops,
        saved=saved,
        input_bytes=2 * t * h,
        output_bytes=2 * t * h,
        forward_peak=2 * t * (2 * h + wide),
        backward=(
            BackwardPoint(2 * t * (2 * h + 2 * wide), ZERO, 0.25, 0.0),
            BackwardPoint(2 * t * 2 * h, 2 * t * (5 * h + wide), 1.0, 1.0),
        ),
    )


def simple_segment(
    name: str, block: str, role: str, groups: list[list[Op]], params: list[Param], kept: Expr
) -> Segment:
    ops = interleave(groups)
    saved = saved_by_policy(kept, kept, kept / 2, ops)
    backward = (BackwardPoint(kept, ZERO),)
    return Segment(name, block, role, 1, ("",), tuple(params), ops, saved, kept, kept, kept, backward)


def head_segment(block: str, tokens: Expr, hidden: int, vocab: int) -> Segment:
    logits = tokens * vocab
    segment = simple_segment(
        f"{block}.head",
        block,
        "head",
        [memory_op("norm", 4 * tokens * hidden), gemm("lm_head", tokens, vocab, hidden), memory_op("loss", 8 * logits)],
        [Param("lm_head", (vocab, hidden))],
        2 * tokens * hidden,
    )
    full = {policy: Saved(6 * logits, 6 * logits, ()) for policy in Recompute}
    return replace(segment, saved=full, forward_peak=4 * logits, logits=(tokens, vocab))


def embed_segment(block: str, tokens: Expr, hidden: int, vocab: int) -> Segment:
    return simple_segment(
        f"{block}.embed", block, "embed", [memory_op("embed", 4 * tokens * hidden)], [Param("embed", (vocab, hidden))],
        sympy.Integer(8) * tokens,
    )  # fmt: skip


def language_model(stack: Stack, vocab: int, seq_len: int, name: str = "lm") -> Program:
    segments = (
        embed_segment(stack.block, stack.tokens, stack.hidden, vocab),
        layer_segment(stack),
        head_segment(stack.block, stack.tokens, stack.hidden, vocab),
    )
    block = Block(stack.block, "backbone", "", tuple(s.name for s in segments))
    runs = tuple(Run(s.name, s.count) for s in segments)
    return Program(name, name, (block,), segments, runs, (), SampleShape(seq_len=seq_len))


def with_encoder(program: Program, stack: Stack, units: str, merge: int, sample: SampleShape) -> Program:
    """Add an encoder block before the backbone: patch embedding, layers, projector."""
    hidden = program.segments[0].params[0].shape[-1]
    backbone = next(b for b in program.blocks if b.kind == "backbone")
    rows = stack.tokens / merge
    projector = simple_segment(
        f"{stack.block}.projector",
        stack.block,
        "projector",
        [gemm("project", rows, hidden, stack.hidden * merge)],
        [Param("project", (hidden, stack.hidden * merge))],
        2 * rows * (hidden + stack.hidden * merge),
    )
    patch = simple_segment(
        f"{stack.block}.patch",
        stack.block,
        "embed",
        [gemm("patch", stack.tokens, stack.hidden, 1176)],
        [Param("patch", (stack.hidden, 1176))],
        2 * stack.tokens * 1176,
    )
    segments = (patch, layer_segment(stack), projector)
    block = Block(stack.block, "encoder", stack.block, tuple(s.name for s in segments), units)
    runs = tuple(Run(s.name, s.count) for s in segments)
    edge = Edge(stack.block, backbone.name, 2 * rows * hidden)
    return replace(
        program,
        blocks=(block, *program.blocks),
        segments=(*segments, *program.segments),
        runs=(*runs, *program.runs),
        edges=(*program.edges, edge),
        sample=sample,
    )


def dense_lm(seq_len: int = 8192) -> Program:
    """Like an 8-billion-parameter dense model."""
    stack = Stack("text", 32, 4096, 32, 8, 14336, Sym.S, Sym.S2, causal=True)
    return language_model(stack, 128256, seq_len)


def moe_lm(seq_len: int = 8192) -> Program:
    """Like a 30-billion-parameter model with 3 billion active."""
    stack = Stack("text", 48, 2048, 32, 4, 768, Sym.S, Sym.S2, causal=True, experts=128, top_k=8)
    return language_model(stack, 151936, seq_len)


def vision_language_72b(seq_len: int = 8192) -> Program:
    text = Stack("text", 80, 8192, 64, 8, 29568, Sym.S, Sym.S2, causal=True)
    vision = Stack("vision", 32, 1280, 16, 16, 2560, Sym.N, Sym.N2, causal=False)
    sample = SampleShape(patches_per_image=4096, tokens_per_image=1024, images=2, seq_len=seq_len)
    return with_encoder(language_model(text, 152064, seq_len), vision, "I", 4, sample)


def vision_language_7b(seq_len: int = 8192) -> Program:
    text = Stack("text", 28, 3584, 28, 4, 18944, Sym.S, Sym.S2, causal=True)
    vision = Stack("vision", 32, 1280, 16, 16, 2560, Sym.N, Sym.N2, causal=False)
    sample = SampleShape(patches_per_image=4096, tokens_per_image=1024, images=2, seq_len=seq_len)
    return with_encoder(language_model(text, 152064, seq_len), vision, "I", 4, sample)


def omni_moe(seq_len: int = 16384) -> Program:
    """Vision and audio encoders before a mixture of experts."""
    vision = Stack("vision", 27, 1152, 16, 16, 2152, Sym.N, Sym.N2, causal=False)
    audio = Stack("audio", 32, 1280, 20, 20, 2560, Sym.A, Sym.A2, causal=False)
    sample = SampleShape(
        patches_per_image=4096, tokens_per_image=1024, images=2, frames_per_clip=1500, tokens_per_clip=390, clips=1,
        seq_len=seq_len,
    )  # fmt: skip
    return with_encoder(with_encoder(moe_lm(seq_len), vision, "I", 4, sample), audio, "C", 2, sample)


def untrained(program: Program, names: set[str], block: str = "") -> Program:
    """The program of a model that does not let parameters of these names, and all of `block`, be trained."""
    segments = tuple(
        replace(s, params=tuple(replace(p, trained=s.block != block and p.name not in names) for p in s.params))
        for s in program.segments
    )
    return replace(program, segments=segments)


def random_program(seed: int) -> Program:
    """A small program whose weights or activations may or may not fit."""
    rng = random.Random(seed)
    seq_len = rng.choice([1024, 4096, 16384, 65536])
    heads = rng.choice([4, 8, 12, 40])
    kv_heads = rng.choice([h for h in (1, 2, 4) if heads % h == 0])
    hidden = heads * rng.choice([64, 128, 256])
    experts = rng.choice([0, 0, 4, 8])
    text = Stack(
        "text", rng.choice([1, 2, 5, 24, 60]), hidden, heads, kv_heads, hidden * rng.choice([2, 4]), Sym.S, Sym.S2,
        causal=True, experts=experts, top_k=2 if experts else 0,
    )  # fmt: skip
    program = language_model(text, rng.choice([1000, 50000, 150000]), seq_len, f"random {seed}")
    if rng.random() < 0.5:
        return program
    width = rng.choice([4, 6])
    vision = Stack("vision", rng.choice([1, 3, 24]), width * 64, width, width, width * 256, Sym.N, Sym.N2, causal=False)
    images = rng.choice([1, 2, 3])
    sample = SampleShape(patches_per_image=1024, tokens_per_image=256, images=images, seq_len=seq_len)
    return with_encoder(program, vision, "I", 4, sample)
