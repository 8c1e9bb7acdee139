"""Evaluate a `Schedule`: when each task runs, what is exposed, and the peak of memory.

A loop is a max-plus linear system, so its iterations soon repeat: every stream advances by a constant amount from one
period (a few iterations) to the next. `simulate` runs iterations until that is so and then skips as many periods as the
order of arrivals provably cannot change in. Times are multiples of 2**-42 s, so sums and comparisons are exact (up to
2,048 s), and the result equals that of running every iteration. Once a loop repeats, its count costs nothing; only
where streams advance at different rates are the allocations of every iteration sorted (by numpy) for the memory peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.memory_peak import Events, Repeat, peak
from omnicompile.cost_model.schedule import COMPUTE, INTER, INTRA, STREAMS, Loop, Schedule

_QUANTA = 2.0**42
_MAX_PERIOD = 4
_COMPUTE = STREAMS.index(COMPUTE)


@dataclass(frozen=True)
class Timeline:
    """What a schedule takes.

    seconds: of the whole step. busy: seconds of work by stream. by_kind: seconds of work by task kind.
    exposed: seconds in which the compute stream idles, by the kind of what it waits for (at the end of the step: of
    what still runs). hidden: the rest of the seconds of the kinds on other streams. peak_bytes: base_bytes included.
    tasks: (name, stream, start, end, kind, block) of the iterations that were run one by one, if kept.
    busy["compute"] plus all of exposed equals seconds.
    """

    seconds: float
    busy: dict[str, float]
    by_kind: dict[str, float]
    exposed: dict[str, float]
    hidden: dict[str, float]
    peak_bytes: float
    tasks: list[tuple[str, str, float, float, str, str]] = field(default_factory=list)


def simulate(
    schedule: Schedule, hw: Hardware | None = None, keep_tasks: bool = False, every_iteration: bool = False
) -> Timeline:
    """Run a schedule. every_iteration: skip none of those that repeat (the result is the same; for `keep_tasks`).

    hw: if given, compute tasks are slowed by collectives beside them: in each loop by the factor
    1 + hw.contention_factor * min(1, communication seconds / compute seconds); if None, they are as given.
    Raises ValueError for a schedule that is not well-formed: an unknown stream or dependency, a dependency of lag 0 on
    a task listed later, a name used twice, a negative number.
    """
    run = _Run(keep_tasks, every_iteration)
    if len({loop.name for loop in schedule.loops}) != len(schedule.loops):
        raise ValueError("a loop name is used twice")
    for loop in schedule.loops:
        run.loop(loop, hw.contention_factor if hw is not None else 0.0)
    return run.result(schedule.base_bytes)


@dataclass(slots=True)
class _Body:
    """A loop made ready to run: parallel lists over its tasks.

    deltas: positions of what a task waits for, relative to its own in the flat history (in-loop dependencies only).
    lags: their lags. outside: positions in the history of what it waits for in earlier loops. previous: relative
    position of the task before it on its stream, in this iteration or the one before.
    """

    loop: Loop
    index: dict[str, int]
    streams: list[int]
    seconds: list[float]
    deltas: list[tuple[int, ...]]
    lags: list[tuple[int, ...]]
    outside: list[tuple[int, ...]]
    previous: list[int]
    max_lag: int
    memory: list[tuple[int, float, float]]


@dataclass(frozen=True, slots=True)
class _Done:
    """An earlier loop: its tasks' numbers by name, and the position of its last iteration (None: it had none)."""

    index: dict[str, int]
    base: int | None


class _Run:
    """The state of a simulation: the history of all tasks run so far, in order of listing."""

    def __init__(self, keep_tasks: bool, every_iteration: bool = False) -> None:
        self.every_iteration = every_iteration
        self.start: list[float] = []
        self.end: list[float] = []
        self.binder: list[int] = []  # position of what a task waited for last, or -1
        self.kind: list[str] = []
        self.free = [0.0] * len(STREAMS)
        self.last = [-1] * len(STREAMS)
        self.loops: dict[str, _Done] = {}
        self.busy = dict.fromkeys(STREAMS, 0.0)
        self.by_kind: dict[str, float] = {}
        self.off_compute: dict[str, float] = {}
        self.exposed: dict[str, float] = {}
        self.events = Events()
        self.repeats: list[Repeat] = []
        self.tasks: list[tuple[str, str, float, float, str, str]] | None = [] if keep_tasks else None

    def loop(self, loop: Loop, contention: float) -> None:
        body = _prepare(loop, self.loops, contention)
        self._account(body)
        size, done, window = len(loop.tasks), 0, 0
        kinds = [task.kind for task in loop.tasks]
        exposed: list[dict[str, float]] = []
        while done < loop.count and size:
            exposed.append(self._iterate(body, done, kinds))
            done += 1
            window += 1
            if loop.count - done >= 2 and not self.every_iteration:
                period, periods, steps = self._find_period(body, done, window, loop.count - done)
                if periods:
                    window = self._skip(body, period, periods, steps, exposed)
                    done += period * periods
        self.loops[loop.name] = _Done(body.index, len(self.end) - size if done else None)
        for ledger in exposed:
            _add(self.exposed, ledger, 1)

    def result(self, base_bytes: float) -> Timeline:
        seconds = max(self.free)
        before = self.free[_COMPUTE]
        if seconds > before:
            self._attribute(before, seconds, self.last[self.free.index(seconds)], self.exposed)
        hidden = {kind: max(0.0, total - self.exposed.get(kind, 0.0)) for kind, total in self.off_compute.items()}
        return Timeline(
            seconds=seconds,
            busy=self.busy,
            by_kind=self.by_kind,
            exposed={kind: value for kind, value in self.exposed.items() if value > 0},
            hidden=hidden,
            peak_bytes=base_bytes + peak(self.events, self.repeats),
            tasks=self.tasks or [],
        )

    def _account(self, body: _Body) -> None:
        for task, stream, seconds in zip(body.loop.tasks, body.streams, body.seconds):
            total = seconds * body.loop.count
            self.busy[task.stream] += total
            self.by_kind[task.kind] = self.by_kind.get(task.kind, 0.0) + total
            if stream != _COMPUTE:
                self.off_compute[task.kind] = self.off_compute.get(task.kind, 0.0) + total

    def _iterate(self, body: _Body, iteration: int, kinds: list[str]) -> dict[str, float]:
        """Run one iteration; returns the exposed seconds by kind."""
        start, end, binder, free, last = self.start, self.end, self.binder, self.free, self.last
        base = position = len(end)
        waits = body.deltas if iteration >= max(body.max_lag, 1) else _early_waits(body, iteration, base)
        gaps: list[tuple[float, float, int]] = []
        add_start, add_end, add_binder = start.append, end.append, binder.append
        for stream, seconds, deltas in zip(body.streams, body.seconds, waits):
            before = begin = free[stream]
            bind = last[stream]
            for delta in deltas:
                ready = end[position + delta]
                if ready > begin:
                    begin = ready
                    bind = position + delta
            if begin > before and stream == _COMPUTE:
                gaps.append((before, begin, bind))
            add_start(begin)
            free[stream] = begin = begin + seconds
            add_end(begin)
            add_binder(bind)
            last[stream] = position
            position += 1
        self.kind += kinds
        self._record(body, base)
        exposed: dict[str, float] = {}
        for before, begin, bind in gaps:
            self._attribute(before, begin, bind, exposed)
        return exposed

    def _record(self, body: _Body, base: int) -> None:
        for i, alloc, freed in body.memory:
            if alloc:
                self.events.add(self.start[base + i], alloc)
            if freed:
                self.events.add(self.end[base + i], -freed)
        if self.tasks is not None:
            self.tasks += [
                (task.name, task.stream, self.start[base + i], self.end[base + i], task.kind, task.block)
                for i, task in enumerate(body.loop.tasks)
            ]

    def _attribute(self, before: float, top: float, position: int, into: dict[str, float]) -> None:
        """Charge the idle time from `before` to `top` to the chain of tasks that ends at `position`."""
        while top > before and position >= 0:
            low = max(self.start[position], before)
            if low < top:
                kind = self.kind[position]
                into[kind] = into.get(kind, 0.0) + top - low
                top = low
            position = self.binder[position]

    def _find_period(self, body: _Body, done: int, window: int, left: int) -> tuple[int, int, list[float]]:
        """(iterations of a period, periods that may be skipped, seconds by which each stream advances in a period)."""
        size = len(body.streams)
        for period in range(1, _MAX_PERIOD + 1):
            block = max(body.max_lag, period)
            if window < block + period or done - period < max(body.max_lag, 1) or left < 2 * period:
                break
            steps = self._steps(body, period * size, block)
            if steps is not None:
                periods = min(left // period, self._safe_periods(body, period, steps))
                return period, periods if periods >= 2 else 0, steps
        return 0, 0, []

    def _steps(self, body: _Body, distance: int, block: int) -> list[float] | None:
        """By how much each stream advanced over `distance` positions, if all its tasks in `block` iterations agree."""
        end = self.end
        steps = [0.0] * len(STREAMS)
        for stream in set(body.streams):
            steps[stream] = end[self.last[stream]] - end[self.last[stream] - distance]
        position = len(end)
        for _ in range(block):
            position -= len(body.streams)
            for i, stream in enumerate(body.streams):
                if end[position + i] - end[position + i - distance] != steps[stream]:
                    return None
        return steps

    def _safe_periods(self, body: _Body, period: int, steps: list[float]) -> int:
        """For how many periods every task keeps waiting for the same thing, if all streams go on at their steps."""
        used = {steps[stream] for stream in body.streams}
        limit = float("inf")
        if len(used) == 1:
            return 2**62
        size = len(body.streams)
        base = len(self.end) - period * size
        for position in range(base, len(self.end)):
            i = (position - base) % size
            step = steps[body.streams[i]]
            held = False
            for delta in (body.previous[i], *body.deltas[i]):
                slack = self.start[position] - self.end[position + delta]
                faster = steps[body.streams[(i + delta) % size]] - step
                held = held or (slack == 0 and faster == 0)
                if faster > 0:
                    limit = min(limit, slack // faster)
            if not held:
                return 0
        return int(min(limit, 2**62))

    def _skip(self, body: _Body, period: int, periods: int, steps: list[float], exposed: list[dict[str, float]]) -> int:
        """Append the last iterations once more, `periods` periods later; returns how many."""
        size = len(body.streams)
        block = max(body.max_lag, period)
        shifts = [step * periods for step in steps]
        first = len(self.end) - block * size
        offset = block * size
        by_task = [shifts[stream] for stream in body.streams] * block
        self.start += [time + shift for time, shift in zip(self.start[first:], by_task)]
        self.end += [time + shift for time, shift in zip(self.end[first:], by_task)]
        self.binder += [bind + offset if bind >= first else bind for bind in self.binder[first:]]
        self.kind += self.kind[first:]
        for stream in set(body.streams):
            self.free[stream] += shifts[stream]
            self.last[stream] += offset
        self._repeat(body, first + offset - period * size, period, periods, steps)
        for ledger in exposed[-period:]:
            _add(self.exposed, ledger, periods)
        return block

    def _repeat(self, body: _Body, base: int, period: int, periods: int, steps: list[float]) -> None:
        if not body.memory:
            return
        events, shifts = Events(), []
        for iteration in range(period):
            for i, alloc, freed in body.memory:
                position = base + iteration * len(body.streams) + i
                for time, delta in ((self.start[position], alloc), (self.end[position], -freed)):
                    if delta:
                        events.add(time, delta)
                        shifts.append(steps[body.streams[i]])
        self.repeats.append(Repeat(events, shifts, periods))


def _add(total: dict[str, float], part: Mapping[str, float], times: int) -> None:
    for kind, seconds in part.items():
        total[kind] = total.get(kind, 0.0) + seconds * times


def _early_waits(body: _Body, iteration: int, base: int) -> list[tuple[int, ...]]:
    """What tasks wait for while some lags reach before the loop, and (once) in earlier loops."""
    waits = body.deltas.copy()
    for i, task in enumerate(body.loop.tasks):
        if task.after:
            inside = [delta for delta, lag in zip(body.deltas[i], body.lags[i]) if lag <= iteration]
            if iteration == 0:
                inside += [position - base - i for position in body.outside[i]]
            waits[i] = tuple(inside)
    return waits


def _prepare(loop: Loop, earlier: Mapping[str, _Done], contention: float) -> _Body:
    """Resolve names and check a loop."""
    tasks, size = loop.tasks, len(loop.tasks)
    index = {task.name: i for i, task in enumerate(tasks)}
    latest: dict[int, int] = {}
    if len(index) != size:
        raise ValueError(f"loop {loop.name!r}: a task name is used twice")
    if loop.count < 0:
        raise ValueError(f"loop {loop.name!r}: count {loop.count}")
    numbers = {stream: i for i, stream in enumerate(STREAMS)}
    slow = 1.0 + contention * _overlap(loop)
    body = _Body(loop, index, [], [], [], [], [], [], 0, [])
    for i, task in enumerate(tasks):
        if task.stream not in numbers or task.seconds < 0 or task.alloc < 0 or task.free < 0:
            raise ValueError(f"task {loop.name}.{task.name}: unknown stream {task.stream!r} or a negative number")
        seconds = task.seconds * slow if task.stream == COMPUTE else task.seconds
        body.streams.append(numbers[task.stream])
        body.seconds.append(round(seconds * _QUANTA) / _QUANTA)
        if task.after:
            deltas, lags, outside = _resolve(loop, i, index, earlier)
            body.max_lag = max(body.max_lag, *lags) if lags else body.max_lag
        else:
            deltas = lags = outside = ()
        body.deltas.append(deltas)
        body.lags.append(lags)
        body.outside.append(outside)
        if task.alloc or task.free:
            body.memory.append((i, task.alloc, task.free))
    for i, stream in enumerate(body.streams):
        latest[stream] = i - size
    for i, stream in enumerate(body.streams):
        body.previous.append(latest[stream] - i)
        latest[stream] = i
    return body


def _resolve(
    loop: Loop, i: int, index: Mapping[str, int], earlier: Mapping[str, _Done]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(deltas, lags, outside) of task number `i`; see `_Body`."""
    task = loop.tasks[i]
    deltas, lags, outside = [], [], []
    for dep in task.after:
        if dep.name in index:
            delta = index[dep.name] - i - dep.lag * len(loop.tasks)
            if delta >= 0 or dep.lag < 0:
                raise ValueError(f"task {loop.name}.{task.name} waits for {dep.name}, which is listed later")
            deltas.append(delta)
            lags.append(dep.lag)
            continue
        other, _, name = dep.name.partition(".")
        if other not in earlier or name not in earlier[other].index or dep.lag:
            raise ValueError(f"task {loop.name}.{task.name} waits for {dep.name} (lag {dep.lag}): no such task")
        base = earlier[other].base
        if base is not None:
            outside.append(base + earlier[other].index[name])
    return tuple(deltas), tuple(lags), tuple(outside)


def _overlap(loop: Loop) -> float:
    """Share of the compute time beside which a collective can run."""
    compute = sum(task.seconds for task in loop.tasks if task.stream == COMPUTE)
    talking = sum(task.seconds for task in loop.tasks if task.stream in (INTRA, INTER))
    return min(1.0, talking / compute) if compute > 0 else 0.0
