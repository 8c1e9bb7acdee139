"""The timeline against a simulator that runs every iteration and knows nothing of periods."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnicompile.cost_model.hardware import load_hardware
from omnicompile.cost_model.schedule import STREAMS, Dep, Loop, Schedule, Task
from omnicompile.cost_model.timeline import simulate


def naive(schedule: Schedule) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """(seconds, peak bytes, start and end of every task run) by plain unrolling, in exact integers of 2**-42 s."""
    free = dict.fromkeys(STREAMS, 0)
    ends: dict[tuple[str, str, int], int] = {}
    counts = {loop.name: loop.count for loop in schedule.loops}
    ran: dict[str, tuple[float, float]] = {}
    events: list[tuple[int, int, float]] = []
    for loop in schedule.loops:
        for iteration in range(loop.count):
            for task in loop.tasks:
                start = free[task.stream]
                for dep in task.after:
                    if "." in dep.name:
                        other, _, name = dep.name.partition(".")
                        start = max(start, ends.get((other, name, counts[other] - 1), 0))
                    else:
                        start = max(start, ends.get((loop.name, dep.name, iteration - dep.lag), 0))
                end = start + round(task.seconds * 2**42)
                ends[loop.name, task.name, iteration] = free[task.stream] = end
                ran[f"{loop.name}.{task.name}.{iteration}"] = (start / 2**42, end / 2**42)
                events += [(start, 1, task.alloc), (end, 0, -task.free)]
    now = highest = 0.0
    for _, _, delta in sorted(e for e in events if e[2]):
        now += delta
        highest = max(highest, now)
    return max(free.values()) / 2**42, schedule.base_bytes + highest, ran


def exposed_by_sweep(schedule: Schedule) -> float:
    """Seconds in which the compute stream idles."""
    seconds, _, ran = naive(schedule)
    streams = {f"{loop.name}.{task.name}": task.stream for loop in schedule.loops for task in loop.tasks}
    busy = sum(end - start for key, (start, end) in ran.items() if streams[key.rpartition(".")[0]] == "compute")
    return seconds - busy


@st.composite
def schedules(draw: st.DrawFn, max_count: int = 40) -> Schedule:
    loops: list[Loop] = []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 6))
        tasks: list[Task] = []
        for i in range(size):
            deps = []
            for _ in range(draw(st.integers(0, 2))):
                lag = draw(st.integers(0 if i else 1, 3))
                deps.append(Dep(f"t{draw(st.integers(0, i - 1 if lag == 0 else size - 1))}", lag))
            if draw(st.booleans()) and loops:
                other = draw(st.sampled_from(loops))
                deps.append(Dep(f"{other.name}.{draw(st.sampled_from(other.tasks)).name}"))
            tasks.append(
                Task(
                    name=f"t{i}",
                    stream=draw(st.sampled_from(STREAMS)),
                    seconds=draw(st.sampled_from([0.0, 1e-6, 0.25, 0.3, 1.0, 2.0])),
                    kind=draw(st.sampled_from(["gemm", "all_gather", "reduce_scatter"])),
                    after=tuple(deps),
                    alloc=draw(st.sampled_from([0.0, 0.0, 1.0, 8.0])),
                    free=draw(st.sampled_from([0.0, 0.0, 1.0, 8.0])),
                )
            )
        loops.append(Loop(f"l{number}", tuple(tasks), draw(st.integers(0, max_count))))
    return Schedule(tuple(loops), base_bytes=draw(st.sampled_from([0.0, 100.0])))


@settings(max_examples=250, deadline=None)
@given(schedules())
def test_equals_running_every_iteration(schedule: Schedule) -> None:
    seconds, peak_bytes, ran = naive(schedule)
    result = simulate(schedule, keep_tasks=True)
    assert result.seconds == seconds
    assert result.peak_bytes == pytest.approx(peak_bytes, rel=1e-12)
    assert {(start, end) for _, _, start, end, _, _ in result.tasks} <= set(ran.values())


@settings(max_examples=200, deadline=None)
@given(schedules(max_count=25))
def test_seconds_are_work_plus_exposed(schedule: Schedule) -> None:
    result = simulate(schedule)
    assert sum(result.exposed.values()) == pytest.approx(exposed_by_sweep(schedule), abs=1e-9)
    assert result.busy["compute"] + sum(result.exposed.values()) == pytest.approx(result.seconds, abs=1e-9)


def layers(count: int, gather: float = 1e-3) -> Schedule:
    """A layer: its gather, prefetched one layer ahead, its compute, and the reduction of its gradient."""
    tasks = (
        Task("gather", "inter", gather, "all_gather", after=(Dep("compute", 2),), alloc=10),
        Task("compute", "compute", 2e-3, "gemm", after=(Dep("gather"),), alloc=1, free=10),
        Task("reduce", "intra", 1.5e-3, "reduce_scatter", after=(Dep("compute"),)),
    )
    return Schedule((Loop("layers", tasks, count),), base_bytes=1000)


def test_known_overlap() -> None:
    result = simulate(layers(10))
    assert result.seconds == pytest.approx(1e-3 + 10 * 2e-3 + 1.5e-3)
    assert result.exposed == pytest.approx({"all_gather": 1e-3, "reduce_scatter": 1.5e-3})
    assert result.hidden == pytest.approx({"all_gather": 9e-3, "reduce_scatter": 13.5e-3})
    assert result.peak_bytes == 1000 + 9 + 20
    slow = simulate(layers(10, gather=3e-3))
    assert slow.seconds == pytest.approx(10 * 3e-3 + 2e-3 + 1.5e-3)
    assert slow.exposed["all_gather"] == pytest.approx(10 * 3e-3 - 9 * 2e-3)


def test_the_gap_is_charged_to_the_queue_it_waits_in() -> None:
    tasks = (
        Task("a", "inter", 3.0, "reduce_scatter"),
        Task("b", "inter", 1.0, "all_gather"),
        Task("c", "compute", 1.0, "gemm", after=(Dep("b"),)),
    )
    assert simulate(Schedule((Loop("l", tasks, 1),))).exposed == {"reduce_scatter": 3.0, "all_gather": 1.0}


def test_large_counts_are_exact_and_cost_no_more() -> None:
    begin = time.process_time()
    result = simulate(layers(1_000_000))
    assert time.process_time() - begin < 0.5
    assert result.seconds == pytest.approx(1e-3 + 1_000_000 * 2e-3 + 1.5e-3, rel=1e-9)
    assert result.peak_bytes == 1000 + 999_999 + 20


def test_a_period_of_two_iterations() -> None:
    """Three streams in a chain that may run two iterations ahead: iterations go in pairs."""
    tasks = (
        Task("a", "copy", 1.0, "offload", after=(Dep("c", 2),), alloc=1),
        Task("b", "inter", 1.0, "all_gather", after=(Dep("a"),)),
        Task("c", "compute", 1.0, "gemm", after=(Dep("b"),), free=1),
    )
    for count in (1, 2, 3, 50, 51):
        schedule = Schedule((Loop("l", tasks, count),))
        assert (simulate(schedule).seconds, simulate(schedule).peak_bytes) == naive(schedule)[:2]
    assert len(simulate(schedule, keep_tasks=True).tasks) < 3 * 20


def test_contention_slows_compute_only() -> None:
    hw = replace(load_hardware("h100"), contention_factor=0.1)
    plain, slowed = simulate(layers(10)), simulate(layers(10), hw)
    assert slowed.busy["compute"] == pytest.approx(1.1 * plain.busy["compute"])
    assert slowed.busy["inter"] == plain.busy["inter"]


def test_more_work_never_ends_earlier() -> None:
    seconds = [simulate(layers(20, gather=g * 1e-4)).seconds for g in range(0, 60, 5)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("task", "cause"),
    [
        (Task("t", "gpu", 1.0, "gemm"), "unknown stream"),
        (Task("t", "compute", -1.0, "gemm"), "negative"),
        (Task("t", "compute", 1.0, "gemm", after=(Dep("u"),)), "no such task"),
        (Task("t", "compute", 1.0, "gemm", after=(Dep("t"),)), "listed later"),
    ],
)
def test_malformed_schedules_are_refused(task: Task, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        simulate(Schedule((Loop("l", (task,), 3),)))
    with pytest.raises(ValueError, match="used twice"):
        simulate(Schedule((Loop("l", (), 1), Loop("l", (), 1))))
