"""Graph to graph: one pass per file, each adding the collectives of one kind of parallelism."""

from __future__ import annotations

from omnicompile.passes.align_targets import align_targets_pass
from omnicompile.passes.chunked_experts import chunk_experts_pass
from omnicompile.passes.chunked_loss import fuse_loss_head_pass
from omnicompile.passes.data_mean import insert_data_mean_pass
from omnicompile.passes.dropout import replace_dropout_pass
from omnicompile.passes.expert_parallel import insert_expert_parallel_pass
from omnicompile.passes.functional import remove_mutation_pass
from omnicompile.passes.head_groups import group_heads_pass
from omnicompile.passes.image_order import order_images_pass
from omnicompile.passes.kernel_rewrites import rewrite_kernels_pass
from omnicompile.passes.loss import normalise_loss_pass
from omnicompile.passes.manager import Pass, run_passes
from omnicompile.passes.parameters import shard_parameters_pass
from omnicompile.passes.propagate import insert_sequence_parallel_pass
from omnicompile.passes.rank_program import RankProgram, bind_groups
from omnicompile.passes.split_fused_qkv import split_fused_qkv_pass
from omnicompile.plan import Plan

__all__ = ["FORWARD_PASSES", "RankProgram", "bind_groups", "lower_forward"]

FORWARD_PASSES: tuple[Pass, ...] = (
    Pass("functional", remove_mutation_pass, provides=frozenset({"functional"}), excludes=frozenset({"sequence"})),
    Pass(
        "dropout",
        replace_dropout_pass,
        requires=frozenset({"functional"}),
        provides=frozenset({"keyed-dropout"}),
        excludes=frozenset({"sequence"}),
    ),
    Pass("align-targets", align_targets_pass, provides=frozenset({"aligned"}), excludes=frozenset({"sequence"})),
    Pass("loss", normalise_loss_pass, provides=frozenset({"global-loss"}), excludes=frozenset({"sequence"})),
    Pass(
        "data-mean",
        insert_data_mean_pass,
        requires=frozenset({"functional", "global-loss"}),
        provides=frozenset({"global-means"}),
        excludes=frozenset({"sequence"}),
    ),
    Pass("image-order", order_images_pass, provides=frozenset({"image-order"}), excludes=frozenset({"sequence"})),
    Pass(
        "kernels",
        rewrite_kernels_pass,
        requires=frozenset({"functional", "global-loss"}),
        provides=frozenset({"kernels"}),
        excludes=frozenset({"sequence"}),
    ),
    Pass(
        "split-qkv",
        split_fused_qkv_pass,
        requires=frozenset({"functional", "kernels"}),
        provides=frozenset({"own-products"}),
        excludes=frozenset({"sequence"}),
    ),
    Pass(
        "sequence-parallel",
        insert_sequence_parallel_pass,
        requires=frozenset({"global-loss", "global-means", "keyed-dropout", "image-order"}),
        provides=frozenset({"sequence"}),
        excludes=frozenset({"experts", "parameters"}),
    ),
    Pass(
        "head-groups",
        group_heads_pass,
        requires=frozenset({"sequence"}),
        provides=frozenset({"head-groups"}),
        excludes=frozenset({"parameters"}),
    ),
    Pass(
        "expert-parallel",
        insert_expert_parallel_pass,
        requires=frozenset({"sequence"}),
        provides=frozenset({"experts"}),
        excludes=frozenset({"parameters"}),
    ),
    Pass(
        "chunked-experts",
        chunk_experts_pass,
        requires=frozenset({"experts"}),
        provides=frozenset({"expert-chunks"}),
        excludes=frozenset({"parameters"}),
    ),
    Pass(
        "chunked-loss",
        fuse_loss_head_pass,
        requires=frozenset({"sequence"}),
        provides=frozenset({"loss-head"}),
        excludes=frozenset({"parameters"}),
    ),
    Pass(
        "parameters",
        shard_parameters_pass,
        requires=frozenset({"sequence", "experts"}),
        provides=frozenset({"parameters"}),
    ),
)


def lower_forward(program: RankProgram, plan: Plan | None = None) -> RankProgram:
    """The rewritten forward of one rank; `program` is left as it was. Raises LoweringError for what cannot be
    lowered."""
    return run_passes(program.copy(), FORWARD_PASSES, plan)
