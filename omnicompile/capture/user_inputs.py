"""Captures at the inputs that a user gave: sizes cannot be told apart, so everything grows with the samples alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from omnicompile.capture.regions import modality_of_input
from omnicompile.errors import CaptureError
from omnicompile.program import BackwardPoint, Edge, Expr, GemmShape, Held, Op, Phase, Program, Saved, Segment, Sym

_HOST_NAMES = ("grid", "sizes", "lens", "lengths", "mask")


@dataclass(frozen=True)
class UserInputs:
    """A user's forward arguments: which are host metadata, and what a sample holds."""

    kwargs: dict[str, Any]
    host: set[str]
    seq_len: int
    images: int
    clips: int


def split_user_inputs(kwargs: Any) -> UserInputs:
    """Integer tensors whose name says that they hold sizes are metadata. Raises CaptureError if it is no mapping."""
    if not isinstance(kwargs, Mapping):
        raise CaptureError(f"inputs() must return a dict of forward arguments, got {type(kwargs).__name__}")
    host, seq_len, images, clips = set(), 0, 0, 0
    for name, value in kwargs.items():
        if not isinstance(value, Tensor):
            continue
        modality = modality_of_input(name)
        if not value.is_floating_point():
            if any(part in name for part in _HOST_NAMES):
                host.add(name)
            elif modality == "text" and value.dim() > 1:
                seq_len = max(seq_len, value.shape[1])
        elif modality in ("vision", "video") and value.dim() > 2:
            images = max(images, value.shape[0])
        elif modality == "audio" and value.dim() > 1:
            clips = max(clips, value.shape[0])
    return UserInputs(dict(kwargs), host, seq_len, images, clips)


def batch_scaled(program: Program) -> Program:
    """Every activation size and FLOP count times the number of samples B; parameters stay as they are."""
    segments = tuple(_scaled_segment(s) for s in program.segments)
    edges = tuple(Edge(e.source, e.target, e.nbytes * Sym.B) for e in program.edges)
    blocks = tuple(
        replace(b, units="I" if b.kind == "encoder" and program.sample.images else "") for b in program.blocks
    )
    return replace(program, segments=segments, edges=edges, blocks=blocks)


def _scaled_segment(segment: Segment) -> Segment:
    def times(expr: Expr) -> Expr:
        return expr * Sym.B

    saved = {p: Saved(times(s.nbytes), times(s.nbytes_frozen), s.recompute_ops) for p, s in segment.saved.items()}
    logits = segment.logits
    return replace(
        segment,
        ops=tuple(_scaled_op(op) for op in segment.ops),
        saved=saved,
        input_bytes=times(segment.input_bytes),
        output_bytes=times(segment.output_bytes),
        forward_peak=times(segment.forward_peak),
        backward=tuple(_scaled_point(p) for p in segment.backward),
        logits=None if logits is None else (times(logits[0]), logits[1]),
    )


def _scaled_point(point: BackwardPoint) -> BackwardPoint:
    under = {p: Held(h.temporaries * Sym.B, h.freed * Sym.B) for p, h in point.under.items()}
    return replace(point, temporaries=point.temporaries * Sym.B, freed=point.freed * Sym.B, under=under)


def _scaled_op(op: Op) -> Op:
    changes: dict[str, Any] = {"flops": op.flops * Sym.B, "activation_bytes": op.activation_bytes * Sym.B}
    if op.gemm is not None:
        shape = op.gemm
        # A product that only a weight gradient needs sums over tokens: they run along k.
        if op.phase is Phase.BACKWARD and op.feeds == frozenset({"weight"}):
            changes["gemm"] = GemmShape(shape.m, shape.n, shape.k * Sym.B, shape.batch)
            changes["token_dim"] = "k"
        else:
            changes["gemm"] = GemmShape(shape.m * Sym.B, shape.n, shape.k, shape.batch)
            changes["token_dim"] = "m"
    if op.attention is not None:
        a = op.attention
        changes["attention"] = replace(
            a, q_tokens=a.q_tokens * Sym.B, kv_tokens=a.kv_tokens * Sym.B, pairs=a.pairs * Sym.B
        )
    if op.experts is not None:
        changes["experts"] = replace(op.experts, tokens=op.experts.tokens * Sym.B)
    return replace(op, **changes)
