"""The chain of one segment instance when its exchanges run beside compute, as `passes.async_ulysses` schedules them.

All-to-alls around attention and experts are launched when their input is there, and waited for by what reads them. What
leads to the first exchange is computed first, and products that nothing waits for (weight gradients) are put where a
wait would stand still. A chain then holds launches: pieces that the next ones do not wait for, each with a number, and
pieces that wait for launches by number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from omnicompile.cost_model.step_chain import Chain, attention_exchange_bytes, expert_exchange_bytes, merge
from omnicompile.cost_model.step_layout import Groups, Split
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.program import OpKind, Phase

REACH = 8
"""Products before a launch that may be put behind it (as in `passes.hidden_work`)."""


@dataclass(frozen=True)
class Exchange:
    """piece: its price. ready: position of the operator that gives its input (-1: it is there). needed: position of the
    first operator that reads its result."""

    piece: Piece
    ready: int
    needed: int


def overlaps(ops: Sequence[OpNumbers], split: Split, groups: Groups) -> bool:
    """Whether there is anything to launch early. Tensor and context parallelism have exchanges of their own."""
    plain = split.tensor == 1 and split.context == 1 and groups.expert_tensor.trivial
    attention = split.heads > 1 and any(op.op.attention is not None for op in ops)
    return plain and (attention or (not groups.experts.trivial and any(_is_expert(op) for op in ops)))


def overlapped_chain(
    ops: Sequence[OpNumbers], seconds: Sequence[float], split: Split, groups: Groups, prices: Prices, kind: str
) -> Chain:
    """Operators in an order that hides exchanges, with their launches. ops, seconds: of one phase, as traced."""
    order = _early_first(ops) if split.heads > 1 else list(range(len(ops)))
    ops, seconds = [ops[i] for i in order], [seconds[i] for i in order]
    found = [*_around_attention(ops, split, groups, prices), *_around_experts(ops, split, groups, prices)]
    return _Emitter(ops, seconds, kind, found).chain()


def _is_expert(op: OpNumbers) -> bool:
    return op.op.kind is OpKind.GROUPED_GEMM and op.op.experts is not None


def _is_free(op: OpNumbers) -> bool:
    """Whether nothing but a parameter's gradient comes of it."""
    return op.op.phase is Phase.BACKWARD and op.op.feeds == frozenset({"weight"})


def _early_first(ops: Sequence[OpNumbers]) -> list[int]:
    """Element-wise work between the products of q, k, v and attention goes with the first of them, so that the others
    run beside its exchange."""
    order = list(range(len(ops)))
    for at in _attention(ops):
        if ops[at].op.phase is not Phase.FORWARD:
            continue
        products = _products(ops, at)
        between = list(range(products[-1] + 1, at)) if products else []
        if len(products) > 1 and between:
            ready = min(_makers(ops, at))
            order = [i for i in order if i not in between]
            where = order.index(ready) + 1
            order[where:where] = between
    return order


def _attention(ops: Sequence[OpNumbers]) -> list[int]:
    return [i for i, op in enumerate(ops) if op.op.attention is not None]


def _products(ops: Sequence[OpNumbers], at: int) -> list[int]:
    """GEMMs between the attention or experts before `at` and it."""
    found: list[int] = []
    for i in range(at - 1, -1, -1):
        if ops[i].op.attention is not None or _is_expert(ops[i]):
            break
        if ops[i].op.kind is OpKind.GEMM:
            found.append(i)
    return found[::-1]


def _widths(op: OpNumbers) -> tuple[int, int, int]:
    """Elements per token of query, key and value."""
    shape = op.op.attention
    assert shape is not None
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.v_head_dim


def _makers(ops: Sequence[OpNumbers], at: int) -> tuple[int, int, int]:
    """Positions of the products that make query, key and value: by their widths, from the last; where none has the
    width (a fused product), the last of all."""
    free = _products(ops, at)
    last = free[-1] if free else -1
    found: list[int] = []
    for width in reversed(_widths(ops[at])):
        match = next((i for i in reversed(free) if ops[i].n == width), None)
        if match is not None:
            free.remove(match)
        found.append(last if match is None else match)
    return found[2], found[1], found[0]


def _readers(ops: Sequence[OpNumbers], at: int) -> tuple[int, int, int]:
    """Backward: positions of the first products that read the gradients of query, key and value, value's first."""
    free = [i for i in range(at + 1, len(ops)) if ops[i].op.kind is OpKind.GEMM]
    first = free[0] if free else min(at + 1, len(ops))
    found: list[int] = []
    for width in reversed(_widths(ops[at])):
        match = [i for i in free if width in (ops[i].m, ops[i].n, ops[i].k)][:2]
        free = [i for i in free if i not in match]
        found.append(match[0] if match else first)
    return found[2], found[1], found[0]


def _around_attention(ops: Sequence[OpNumbers], split: Split, groups: Groups, prices: Prices) -> list[Exchange]:
    found: list[Exchange] = []
    if split.heads == 1:
        return found

    def add(nbytes: float, ready: int, needed: int) -> None:
        found.extend(
            Exchange(piece, ready, needed) for piece in prices.collective("all_to_all", nbytes, groups.sequence)
        )

    for at in _attention(ops):
        inward, (output,) = attention_exchange_bytes(ops[at], split)
        if ops[at].op.phase is Phase.FORWARD:
            for nbytes, ready in zip(inward, _makers(ops, at)):
                add(nbytes, ready, at)
            add(output, at, at + 1)
            continue
        before = [i for i in range(at) if ops[i].op.kind is OpKind.GEMM and not _is_free(ops[i])]
        add(output, before[-1] if before else -1, at)
        gradients = sorted(zip(inward, _readers(ops, at)), key=lambda pair: pair[1])
        for nbytes, needed in gradients:
            add(nbytes, at, needed)
    return found


def _around_experts(ops: Sequence[OpNumbers], split: Split, groups: Groups, prices: Prices) -> list[Exchange]:
    experts = [i for i, op in enumerate(ops) if _is_expert(op)]
    if not experts or groups.experts.trivial:
        return []
    copies = ops[experts[0]].op.experts.top_k if prices.stack.dedup_dispatch else 0  # type: ignore[union-attr]
    pieces = prices.collective("all_to_all", expert_exchange_bytes(ops[experts[0]], split), groups.experts, copies)
    last = max((i for i in experts if not _is_free(ops[i])), default=experts[-1])
    after = next((i for i in range(last + 1, len(ops)) if not _is_free(ops[i])), len(ops))
    return [e for p in pieces for e in (Exchange(p, experts[0] - 1, experts[0]), Exchange(p, last, after))]


@dataclass
class _Flight:
    """A launch that was waited for. start, end: pieces between which it ran. slack: seconds it was over before."""

    start: int
    end: int
    slack: float


@dataclass
class _Emitter:
    """Walks the operators with clocks of the compute stream and the channels, as they run alone.

    ends: of launches, by number. places: of operators, as indices of `pieces`. moved: those put behind a launch.
    """

    ops: Sequence[OpNumbers]
    seconds: Sequence[float]
    kind: str
    exchanges: Sequence[Exchange]
    pieces: list[Piece] = field(default_factory=list)
    now: float = 0.0
    channel: dict[str, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    flights: list[_Flight] = field(default_factory=list)
    moved: set[int] = field(default_factory=set)

    def chain(self) -> Chain:
        waiting = dict(enumerate(self.exchanges, start=1))
        self._launch(n for n, e in waiting.items() if e.ready < 0)
        for i in range(len(self.ops)):
            self._compute(i, self._waits(waiting, i))
            self._launch(n for n, e in waiting.items() if e.ready == i)
        rest = self._waits(waiting, len(self.ops))
        if rest:
            self.pieces.append(Piece("compute", 0.0, self.kind, after=rest))
        return merge(self.pieces)

    def _waits(self, waiting: dict[int, Exchange], position: int) -> tuple[int, ...]:
        """The launches that have to be over before this operator runs; free products fill the time."""
        due = tuple(n for n, e in waiting.items() if e.needed <= position and n in self.ends)
        for number in due:
            launched = next(i for i, piece in enumerate(self.pieces) if piece.launch == number)
            self._fill(number, launched)
            self.flights.append(_Flight(launched, len(self.pieces), max(0.0, self.now - self.ends[number])))
            self.now = max(self.now, self.ends[number])
            del waiting[number]
        return due

    def _launch(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            piece = self.exchanges[number - 1].piece
            start = max(self.now, self.channel.get(piece.stream, 0.0))
            self.channel[piece.stream] = self.ends[number] = start + piece.seconds
            self.pieces.append(replace(piece, launch=number))

    def _compute(self, i: int, after: tuple[int, ...]) -> None:
        self.places[i] = len(self.pieces)
        self.pieces.append(Piece("compute", self.seconds[i], self.kind, after=after))
        self.now += self.seconds[i]

    def _fill(self, number: int, launched: int) -> None:
        """Put free products that ran before the launch right before its wait, nearest first, as many as fill it; none
        that hides an earlier exchange."""
        recent = [i for i in self.places if self.places[i] < launched][-REACH:]
        for i in reversed(recent):
            if self.ends[number] <= self.now:
                return
            place, seconds = self.places[i], self.seconds[i]
            hides = [f for f in self.flights if f.start < place < f.end]
            movable = _is_free(self.ops[i]) and i not in self.moved and not self.pieces[place].after
            if movable and all(flight.slack >= seconds for flight in hides):
                for flight in hides:
                    flight.slack -= seconds
                self._move(i, launched)

    def _move(self, i: int, launched: int) -> None:
        """From before a launch to the end: everything launched since begins that much earlier."""
        index = self.places[i]
        piece = self.pieces[index]
        self.pieces[index] = Piece("compute", 0.0, self.kind)
        self.moved.add(i)
        self.pieces.append(piece)
        for later in self.pieces[launched:]:
            if later.launch:
                self.ends[later.launch] -= piece.seconds
        self.channel[self.pieces[launched].stream] -= piece.seconds  # as every launch since is earlier


def makespan(chain: Chain) -> float:
    """Seconds of a chain that has all streams for itself."""
    now, free, ends = 0.0, dict[str, float](), dict[int, float]()
    for piece in chain:
        start = max([now, *(ends[number] for number in piece.after)])
        if piece.stream != "compute":
            start = max(start, free.get(piece.stream, 0.0))
            free[piece.stream] = start + piece.seconds
        if piece.launch:
            ends[piece.launch] = start + piece.seconds
        else:
            now = start + piece.seconds
    return now


def renumbered(chain: Chain, by: int) -> Chain:
    """The chain with other numbers of launches, so that it can stand beside another."""
    return tuple(
        replace(p, launch=p.launch + by if p.launch else 0, after=tuple(n + by for n in p.after)) for p in chain
    )


def check_chain(chain: Chain) -> None:
    """Raises ValueError where a launch is waited for before it is made, or never."""
    launched: set[int] = set()
    waited: set[int] = set()
    for piece in chain:
        if not launched.issuperset(piece.after):
            raise ValueError("a piece waits for what has not been launched")
        waited |= set(piece.after)
        if piece.launch:
            launched.add(piece.launch)
    if launched != waited:
        raise ValueError("a launch is never waited for")
