"""The chain of one segment instance when its exchanges run beside compute, as `passes.async_ulysses` schedules them.

All-to-alls around attention and experts are launched when their input is there, and waited for by what reads them. What
leads to the first exchange is computed first, and products that nothing waits for (weight gradients) are put where a
wait would stand still. A chain then holds launches: pieces that the next ones do not wait for, each with a number, and
pieces that wait for launches by number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from omnicompile.cost_model.step_chain import (
    Chain,
    attention_exchange_bytes,
    expert_exchange_bytes,
    is_free,
    merge,
    width_of,
)
from omnicompile.cost_model.step_layout import Groups, Split
from omnicompile.cost_model.step_numbers import OpNumbers
from omnicompile.cost_model.step_price import Piece, Prices
from omnicompile.plan import Overlap
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


@dataclass(frozen=True)
class _Item:
    """An operator, or one of the `parts` equal parts that it runs in: `part` counts them from 0."""

    op: OpNumbers
    seconds: float
    part: int = 0
    parts: int = 1

    @property
    def free(self) -> bool:
        return is_free(self.op)

    @property
    def is_attention(self) -> bool:
        return self.op.op.attention is not None

    @property
    def is_expert(self) -> bool:
        return self.op.op.kind is OpKind.GROUPED_GEMM and self.op.op.experts is not None

    @property
    def is_product(self) -> bool:
        return self.op.op.kind is OpKind.GEMM


def overlaps(ops: Sequence[OpNumbers], split: Split, groups: Groups) -> bool:
    """Whether there is anything to launch early. Tensor and context parallelism have exchanges of their own."""
    plain = split.tensor == 1 and split.context == 1 and groups.expert_tensor.trivial
    attention = split.heads > 1 and any(op.op.attention is not None for op in ops)
    experts = not groups.experts.trivial and any(op.op.experts is not None for op in ops)
    return plain and (attention or experts)


def overlapped_chain(
    ops: Sequence[OpNumbers],
    seconds: Sequence[float],
    split: Split,
    groups: Groups,
    prices: Prices,
    kind: str,
    overlap: Overlap,
) -> Chain:
    """Operators in an order that hides exchanges, with their launches. ops, seconds: of one phase, as traced."""
    items = [_Item(op, time) for op, time in zip(ops, seconds)]
    if split.heads > 1:
        items = _early_first(_own_products(items, split, prices))
        items = _in_head_groups(items, split, prices, overlap.head_groups)
    if not groups.experts.trivial:
        items = _in_chunks(items, groups.experts.size, overlap.expert_chunks, prices)
    found = [*_around_attention(items, split, groups, prices), *_around_experts(items, split, groups, prices)]
    return _Emitter(items, kind, found).chain()


def head_groups_fit(heads: int, kv_heads: int, sp: int, groups: int) -> bool:
    """Whether a rank's heads can be cut into equal groups that read whole key and value heads (as in
    `passes.head_groups`)."""
    if heads % sp:
        return False
    own = heads // sp
    repeated = own // max(1, max(kv_heads, sp) // sp)
    return own % groups == 0 and (own // groups % repeated == 0 or repeated % (own // groups) == 0)


def _in_head_groups(items: list[_Item], split: Split, prices: Prices, groups: int) -> list[_Item]:
    """Attention in groups of heads, each priced with its own heads; whole where they cannot be cut."""
    result: list[_Item] = []
    for item in items:
        shape = item.op.op.attention
        if shape is None or groups == 1 or not head_groups_fit(shape.heads, shape.kv_heads, split.heads, groups):
            result.append(item)
            continue
        smaller = prices.op(item.op, replace(split, heads=split.heads * groups), 1)
        part = max(item.seconds / groups, smaller) if item.seconds else 0.0
        result += [_Item(item.op, part, i, groups) for i in range(groups)]
    return result


def _in_chunks(items: list[_Item], ranks: int, chunks: int, prices: Prices) -> list[_Item]:
    """Experts, and what lies between their products, in chunks of neighbouring experts, one after the other. None of
    them takes less than a kernel does."""
    experts = [i for i, item in enumerate(items) if item.is_expert]
    if chunks == 1 or not experts or not _chunks_fit(items[experts[0]], ranks, chunks):
        return items
    first, last = experts[0], experts[-1]
    body = items[first : last + 1]
    least = prices.memory(1.0)
    body = [replace(item, seconds=max(item.seconds / chunks, least if item.seconds else 0.0)) for item in body]
    cut = [replace(item, part=i, parts=chunks) for i in range(chunks) for item in body]
    return [*items[:first], *cut, *items[last + 1 :]]


def _chunks_fit(item: _Item, ranks: int, chunks: int) -> bool:
    shape = item.op.op.experts
    return shape is not None and shape.experts // ranks % chunks == 0


def _own_products(items: list[_Item], split: Split, prices: Prices) -> list[_Item]:
    """A product of query, key and value together, or of the last two, as one for each (as in
    `passes.split_fused_qkv`)."""
    parts: dict[int, list[_Item]] = {}
    for at in _attention(items):
        forward = items[at].op.op.phase is Phase.FORWARD
        near = _products(items, at)[::-1] if forward else _products_after(items, at)
        widths = _made_together([items[i] for i in near], _widths(items[at]))
        found = [i for i in near if widths and sum(widths) in _features(items[i])][: 1 if forward else 2]
        own = [[_part_of(items[i], width, sum(widths), split, prices) for width in widths] for i in found]
        if found and not forward:  # value's first, and gradients of one input and weight together
            own = [_with_sum(part[::-1], split, prices) for part in own]
        parts |= {i: [] for i in found}
        if found:
            parts[min(found)] = [item for together in zip(*own) for item in together]
    return [part for i, item in enumerate(items) for part in parts.get(i, [item])]


def _products_after(items: Sequence[_Item], at: int) -> list[int]:
    """GEMMs between the attention at `at` and the next one."""
    end = next((i for i in range(at + 1, len(items)) if items[i].is_attention), len(items))
    return [i for i in range(at + 1, end) if items[i].is_product]


def _made_together(near: Sequence[_Item], widths: tuple[int, int, int]) -> tuple[int, ...]:
    """The widths of what one of these products makes together; empty where each has its own."""
    made = {width for item in near if item.op.op.token_dim != "k" for width in _features(item)}
    for together in (widths, widths[1:]):
        if any(sum(together) in _features(item) for item in near) and not made.issuperset(together):
            return together
    return ()


def _features(item: _Item) -> tuple[float, ...]:
    """Outputs of the linear layer that a product belongs to; of a weight's gradient, its inputs too."""
    if item.op.op.token_dim == "k":
        return item.op.m, item.op.n
    return (item.op.n,) if item.op.op.phase is Phase.FORWARD else (item.op.k,)


def _part_of(item: _Item, width: float, total: float, split: Split, prices: Prices) -> _Item:
    """The part of a product that makes `width` of `total` outputs."""
    sizes = {"m": item.op.m, "n": item.op.n, "k": item.op.k}
    cut = next(name for name, size in sizes.items() if name != item.op.op.token_dim and size == total)
    sizes[cut] = width
    op = replace(item.op, m=sizes["m"], n=sizes["n"], k=sizes["k"])
    return _Item(op, max(item.seconds * width / total, prices.op(op, split, 1)) if item.seconds else 0.0)


def _with_sum(parts: list[_Item], split: Split, prices: Prices) -> list[_Item]:
    """Parts of the input's gradient, which what follows reads and adds up."""
    last = parts[-1]
    if last.op.op.token_dim == "k":
        return parts
    more = (len(parts) - 1) * last.op.m * last.op.n * width_of(last.op) / split.tokens
    return [*parts[:-1], replace(last, seconds=last.seconds + prices.memory(more))]


def _early_first(items: list[_Item]) -> list[_Item]:
    """Element-wise work between the products of q, k, v and attention goes with the first of them, so that the others
    run beside its exchange."""
    order = list(range(len(items)))
    for at in _attention(items):
        if items[at].op.op.phase is not Phase.FORWARD:
            continue
        products = _products(items, at)
        between = list(range(products[-1] + 1, at)) if products else []
        if len(products) > 1 and between:
            ready = min(_makers(items, at))
            order = [i for i in order if i not in between]
            where = order.index(ready) + 1
            order[where:where] = between
    return [items[i] for i in order]


def _attention(items: Sequence[_Item]) -> list[int]:
    """Positions of attention, of its first part."""
    return [i for i, item in enumerate(items) if item.is_attention and item.part == 0]


def _products(items: Sequence[_Item], at: int) -> list[int]:
    """GEMMs between the attention or experts before `at` and it."""
    found: list[int] = []
    for i in range(at - 1, -1, -1):
        if items[i].is_attention or items[i].is_expert:
            break
        if items[i].is_product:
            found.append(i)
    return found[::-1]


def _widths(item: _Item) -> tuple[int, int, int]:
    """Elements per token of query, key and value."""
    shape = item.op.op.attention
    assert shape is not None
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.v_head_dim


def _makers(items: Sequence[_Item], at: int) -> tuple[int, int, int]:
    """Positions of the products that make query, key and value: by their widths, from the last; where none has the
    width (a fused product), the last of all."""
    free = _products(items, at)
    last = free[-1] if free else -1
    found: list[int] = []
    for width in reversed(_widths(items[at])):
        match = next((i for i in reversed(free) if items[i].op.n == width), None)
        if match is not None:
            free.remove(match)
        found.append(last if match is None else match)
    return found[2], found[1], found[0]


def _readers(items: Sequence[_Item], at: int) -> tuple[int, int, int]:
    """Backward: positions of the first products that read the gradients of query, key and value, value's first. at: of
    attention's last part."""
    free = [i for i in range(at + 1, len(items)) if items[i].is_product]
    first = free[0] if free else min(at + 1, len(items))
    found: list[int] = []
    for width in reversed(_widths(items[at])):
        match = [i for i in free if width in (items[i].op.m, items[i].op.n, items[i].op.k)][:2]
        free = [i for i in free if i not in match]
        found.append(match[0] if match else first)
    return found[2], found[1], found[0]


def _around_attention(items: Sequence[_Item], split: Split, groups: Groups, prices: Prices) -> list[Exchange]:
    found: list[Exchange] = []
    if split.heads == 1:
        return found

    def add(nbytes: float, ready: int, needed: int) -> None:
        pieces = prices.collective("all_to_all", nbytes, groups.sequence)
        found.extend(Exchange(piece, ready, needed) for piece in pieces)

    for at in _attention(items):
        parts = items[at].parts
        last = at + parts - 1
        inward, (output,) = attention_exchange_bytes(items[at].op, split)
        if items[at].op.op.phase is Phase.FORWARD:
            for nbytes, ready in zip(inward, _makers(items, at)):
                add(nbytes, ready, at)
            for part in range(parts):
                add(output / parts, at + part, last + 1)
            continue
        before = [i for i in range(at) if items[i].is_product and not items[i].free]
        for part in range(parts):
            add(output / parts, before[-1] if before else -1, at + part)
        for nbytes, needed in sorted(zip(inward, _readers(items, last)), key=lambda pair: pair[1]):
            add(nbytes, last, needed)
    return found


def _around_experts(items: Sequence[_Item], split: Split, groups: Groups, prices: Prices) -> list[Exchange]:
    experts = [i for i, item in enumerate(items) if item.is_expert]
    if not experts or groups.experts.trivial:
        return []
    first = items[experts[0]]
    copies = first.op.op.experts.top_k if prices.stack.dedup_dispatch else 0  # type: ignore[union-attr]
    nbytes = expert_exchange_bytes(first.op, split) / first.parts
    after = next((i for i in range(experts[-1] + 1, len(items)) if not items[i].free), len(items))
    found: list[Exchange] = []
    for part in range(first.parts):
        own = [i for i in experts if items[i].part == part]
        last = max((i for i in own if not items[i].free), default=own[-1])
        behind = after if first.parts > 1 else next((i for i in range(last + 1, after) if not items[i].free), after)
        for piece in prices.collective("all_to_all", nbytes, groups.experts, copies):
            found += [Exchange(piece, experts[0] - 1, own[0]), Exchange(piece, last, behind)]
    return found


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

    items: Sequence[_Item]
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
        for i in range(len(self.items)):
            self._compute(i, self._waits(waiting, i))
            self._launch(n for n, e in waiting.items() if e.ready == i)
        rest = self._waits(waiting, len(self.items))
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
        self.pieces.append(Piece("compute", self.items[i].seconds, self.kind, after=after))
        self.now += self.items[i].seconds

    def _fill(self, number: int, launched: int) -> None:
        """Put free products that ran before the launch right before its wait, nearest first, as many as fill it; none
        that hides an earlier exchange."""
        recent = [i for i in self.places if self.places[i] < launched][-REACH:]
        for i in reversed(recent):
            if self.ends[number] <= self.now:
                return
            place, seconds = self.places[i], self.items[i].seconds
            hides = [f for f in self.flights if f.start < place < f.end]
            movable = self.items[i].free and i not in self.moved and not self.pieces[place].after
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
