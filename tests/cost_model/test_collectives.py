"""Collective times: monotonic, above what the links allow, and near published points."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnicompile.cost_model.collectives import KINDS, channel, collective_seconds
from omnicompile.cost_model.hardware import known_hardware, load_hardware
from omnicompile.errors import InputError

GROUPS = [(2, 2), (4, 4), (8, 8), (2, 1), (16, 1), (16, 8), (64, 8), (128, 8), (128, 4), (1024, 8)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(GROUPS), st.sampled_from(known_hardware()), st.floats(1e3, 1e10))
def test_grows_with_bytes_and_respects_the_links(kind: str, group: tuple[int, int], name: str, nbytes: float) -> None:
    hw = load_hardware(name)
    seconds = collective_seconds(kind, nbytes, *group, hw)
    assert collective_seconds(kind, 2 * nbytes, *group, hw) > seconds >= hw.collective.base_seconds
    ranks, local = group
    if ranks > local and kind in ("all_gather", "reduce_scatter", "all_to_all"):
        crossing = nbytes * (ranks - local) / ranks / (1 if kind == "all_to_all" else local)
        assert seconds > crossing / hw.inter_link.bytes_per_second


@pytest.mark.parametrize("kind", KINDS)
def test_more_nodes_are_never_faster(kind: str) -> None:
    hw = load_hardware("h100")
    seconds = [collective_seconds(kind, 1e8, 8 * nodes, 8, hw) for nodes in (1, 2, 4, 16, 64)]
    assert seconds == sorted(seconds)


def test_nothing_to_do_costs_nothing() -> None:
    hw = load_hardware("h100")
    assert collective_seconds("all_gather", 1e9, 1, 1, hw) == 0
    assert collective_seconds("all_reduce", 0, 8, 8, hw) == 0


def test_unknown_collective() -> None:
    with pytest.raises(InputError, match=r"unknown collective 'gossip'.*all_gather"):
        collective_seconds("gossip", 1, 2, 2, load_hardware("h100"))


def test_channel() -> None:
    assert channel(8, 8) == "intra"
    assert channel(16, 8) == "inter"
    assert channel(2, 1) == "inter"


@pytest.mark.parametrize(
    ("name", "kind", "ranks", "local", "nbytes", "busbw", "tolerance"),
    [
        ("a100", "all_reduce", 8, 8, 2**30, 229.04e9, 0.1),  # ml-engineering
        ("a100", "all_reduce", 8, 8, 2**26, 171.54e9, 0.2),
        ("h200", "all_reduce", 8, 8, 2**30, 463.58e9, 0.1),
        ("h200", "all_reduce", 8, 8, 2**24, 219.89e9, 0.1),
        ("h200", "all_gather", 8, 8, 2**34, 361.4e9, 0.05),
        ("h200", "reduce_scatter", 8, 8, 2**34, 362.9e9, 0.05),
        ("h100", "all_reduce", 64, 8, 2**32, 383.2e9, 0.1),  # CoreWeave, InfiniBand
        ("b200", "all_reduce", 32, 8, 2**32, 377.34e9, 0.1),
    ],
)
def test_near_published(
    name: str, kind: str, ranks: int, local: int, nbytes: float, busbw: float, tolerance: float
) -> None:
    factor = (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks
    seconds = collective_seconds(kind, nbytes, ranks, local, load_hardware(name))
    assert factor * nbytes / seconds == pytest.approx(busbw, rel=tolerance)


def test_all_to_all_inside_and_across() -> None:
    a100, h100 = load_hardware("a100"), load_hardware("h100")
    assert collective_seconds("all_to_all", 2**29, 8, 8, a100) == pytest.approx(2482.2e-6, rel=0.1)  # Galvatron
    assert collective_seconds("all_to_all", 2**29, 2, 2, a100) == pytest.approx(1775.2e-6, rel=0.1)
    inside, across = (collective_seconds("all_to_all", 2**27, ranks, 8, h100) for ranks in (8, 16))
    assert across > 3 * inside
