"""Canaries for the private torch API behind simulated ranks (`omnicompile.torch_compat`)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from omnicompile.torch_compat import local_ranks_mode, on_each_rank, ranked, start_fake_group


def test_operators_run_once_per_rank_and_collectives_between_ranks() -> None:
    start_fake_group(2)
    group = dist.group.WORLD.group_name
    with local_ranks_mode(2):
        x = ranked([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x * 2, 2, group)
        summed = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    assert [v.tolist() for v in on_each_rank(gathered)] == [[2.0, 4.0, 6.0, 8.0]] * 2
    assert [v.tolist() for v in on_each_rank(summed)] == [[4.0, 6.0]] * 2


def test_ranks_may_send_different_numbers_of_rows() -> None:
    start_fake_group(2)
    group = dist.group.WORLD.group_name
    with local_ranks_mode(2):
        rows = ranked([torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])])
        sent = ranked([torch.tensor([2, 1]), torch.tensor([1, 2])])
        received = torch.ops._c10d_functional.all_to_all_single(sent, [1, 1], [1, 1], group)
        arrived = torch.ops._c10d_functional.all_to_all_single(rows, received.tolist(), sent.tolist(), group)
    assert [v.tolist() for v in on_each_rank(arrived)] == [[0.0] * 3, [1.0] * 3]


def test_the_fake_group_changes_size() -> None:
    for world in (2, 4, 2):
        start_fake_group(world)
        assert dist.get_world_size() == world
