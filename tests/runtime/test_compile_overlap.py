"""Finer exchanges do not make compile time grow with depth, and a second process starts from Inductor's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import dense_model, make_plan, mixture_model, run_ranks, text_batch

from omnicompile.plan import Mesh, Overlap
from omnicompile.runtime.parallel_module import ParallelModule
from omnicompile.runtime.parallelize import parallelize
from omnicompile.torch_compat import inductor_cache_counts

GROUPS, CHUNKS = Overlap(head_groups=2), Overlap(head_groups=2, expert_chunks=2)


def compilations(rank: int, world: int, kind: str, layers: int, overlap: Overlap) -> tuple[list[int], dict[str, int]]:
    """Graphs given to the compiler after each of two training steps, and what Inductor found in its cache."""
    mesh = Mesh(sp=world, ep=world if kind == "moe" else 1)
    model = mixture_model(layers) if kind == "moe" else dense_model(layers)
    plan = replace(make_plan(("text",), mesh), overlap=overlap)
    module: Any = parallelize(model, plan, "cpu", text_batch(0), "inductor")
    assert isinstance(module, ParallelModule)
    counts = []
    for _ in range(2):
        module(**text_batch(0)).loss.backward()
        counts.append(module.compilations)
    return counts, inductor_cache_counts()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind, overlap", [("dense", GROUPS), ("moe", CHUNKS)])
def test_the_number_of_compilations_does_not_grow_with_depth(kind: str, overlap: Overlap) -> None:
    """Three layers may have one more than eight."""
    shallow, deep = ([counts for counts, _ in run_ranks(compilations, 2, kind, n, overlap)] for n in (3, 8))
    for few, many in zip(shallow, deep, strict=True):
        assert 0 < many[0] <= few[0] and few[0] == few[1] and many[0] == many[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind, overlap", [("dense", Overlap()), ("moe", CHUNKS)])
def test_a_second_run_compiles_nothing_anew(
    kind: str, overlap: Overlap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # inherited by the ranks
    first, second = ([found for _, found in run_ranks(compilations, 2, kind, 2, overlap)] for _ in range(2))
    assert sum(found["miss"] for found in first) > 0
    for found in second:
        assert found["miss"] == found["bypass"] == 0 < found["hit"], second
