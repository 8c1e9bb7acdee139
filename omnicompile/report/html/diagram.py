"""The blocks of a model as cards, with what flows between them: side by side, or one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from markupsafe import Markup

from omnicompile.picture import Flow, Picture, Transfer
from omnicompile.plan import Plan
from omnicompile.program import Program
from omnicompile.report import figures
from omnicompile.report.html import kinds, svg
from omnicompile.report.units import bytes_text, count_text, gib, seconds_text

PAGE = 1040.0
GAP = 132.0  # between columns: room for the words on an arrow
NARROW_CARD, WIDEST_CARD = 336.0, 384.0
MOST_COLUMNS = 3
PAD, LINE, TRANSFER = 16.0, 21.0, 48.0
HEAD = 58.0
SMALL, NORMAL = 11.5, 13.0


@dataclass(frozen=True)
class Card:
    """A block: facts as (label, value), and its communication. longest: seconds of the longest bar of the diagram."""

    name: str
    role: str
    params: str
    facts: tuple[tuple[str, str], ...]
    transfers: tuple[Transfer, ...]
    longest: float

    @property
    def height(self) -> float:
        below = len(self.transfers) * TRANSFER if self.transfers else LINE
        return HEAD + len(self.facts) * LINE + 34 + below + 4


@dataclass(frozen=True)
class _Placed:
    card: Card
    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.y + self.card.height / 2


def cards(plan: Plan, program: Program, picture: Picture) -> list[Card]:
    """A card for each block, in the order of the forward."""
    longest = max((transfer.seconds for transfer in picture.transfers), default=0.0)
    found = []
    for name, block in plan.blocks.items():
        role = program.block(name).kind + (", frozen" if block.frozen else "")
        own = sorted((t for t in picture.transfers if t.block == name and t.seconds), key=lambda t: -t.seconds)
        params = f"{count_text(figures.block_params(program, name))} parameters"
        found.append(Card(name, role, params, tuple(block_facts(plan, name).items()), tuple(own), longest))
    return found


def block_facts(plan: Plan, name: str) -> dict[str, str]:
    """The choices for a block and what they give, in the words of the terminal."""
    block, prediction = plan.blocks[name], plan.prediction
    memory = None if prediction is None else prediction.block_memory.get(name)
    time = None if prediction is None else prediction.block_time.get(name)
    return {
        "sharding": figures.sharding_words(block),
        "activations": figures.LAYOUT_WORDS[block.layout],
        "sp": str(block.sp) if block.sp > 1 else "-",
        "ep": str(block.ep) if block.ep > 1 else "-",
        "recompute": figures.recompute_words(block),
        "memory": "-" if memory is None else gib(memory),
        "compute": "-" if time is None else seconds_text(time),
    }


def is_wide(program: Program) -> bool:
    """Whether the blocks have room side by side, and all that flows goes to the next column."""
    edges = _edges(program)
    columns = _columns([block.name for block in program.blocks], edges)
    at = {name: number for number, column in enumerate(columns) for name in column}
    return len(columns) <= MOST_COLUMNS and all(at[target] - at[source] == 1 for source, target in edges)


def wide_diagram(program: Program, found: Sequence[Card], flows: Sequence[Flow]) -> Markup:
    """Columns from left to right, as the data flows."""
    by_name = {card.name: card for card in found}
    columns = _columns(list(by_name), _edges(program))
    width = min(WIDEST_CARD, (PAGE - GAP * (len(columns) - 1)) / len(columns))
    heights = [sum(by_name[name].height + 24 for name in column) - 24 for column in columns]
    tallest = max(heights, default=0.0)
    placed: dict[str, _Placed] = {}
    for number, (column, height) in enumerate(zip(columns, heights)):
        y = 1 + (tallest - height) / 2
        for name in column:
            placed[name] = _Placed(by_name[name], 1 + number * (width + GAP), y, width)
            y += by_name[name].height + 24
    body = [_card(item) for item in placed.values()] + _side_arrows(flows, placed)
    whole = len(columns) * (width + GAP) - GAP + 2
    return _drawing("blocks-wide", found, flows, body, whole, tallest + 2)


def tall_diagram(found: Sequence[Card], flows: Sequence[Flow]) -> Markup:
    """One card below the other; flows that pass a card go round it on the left."""
    order = {card.name: number for number, card in enumerate(found)}
    around = [flow for flow in flows if order[flow.target] - order[flow.source] not in (0, 1)]
    gutter = 14.0 * len(around)
    placed: dict[str, _Placed] = {}
    y = 1.0
    for card in found:
        arriving = sum(flow.target == card.name and flow.source != card.name for flow in flows)
        y += 0.0 if not placed else max(24.0, 22.0 + 16 * arriving)
        placed[card.name] = _Placed(card, 1 + gutter, y, NARROW_CARD)
        y += card.height
    body = [_card(item) for item in placed.values()]
    body += _down_arrows(flows, placed, {flow: 8.0 + 14 * lane for lane, flow in enumerate(around)})
    return _drawing("blocks-tall", found, flows, body, NARROW_CARD + gutter + 2, y + 2)


def _drawing(
    key: str, found: Sequence[Card], flows: Sequence[Flow], body: Sequence[str], width: float, height: float
) -> Markup:
    cards_said = "; ".join(
        f"{card.name}: {card.params}, {', '.join(f'{k} {v}' for k, v in card.facts)}" for card in found
    )
    flows_said = "; ".join(f"{flow.source} to {flow.target}: {_flow_words(flow)}" for flow in flows)
    said = f"{cards_said}. {flows_said}." if flows else f"{cards_said}."
    box = f"0 0 {svg.number(width)} {svg.number(height)}"
    style = f"max-width:{svg.number(width)}px"
    return svg.drawing(key, "Blocks of the model", said, body, viewBox=box, width="100%", style=style, class_="diagram")


def _edges(program: Program) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in program.edges if edge.source != edge.target}


def _columns(names: Sequence[str], edges: set[tuple[str, str]]) -> list[list[str]]:
    """Blocks by how many others their data has passed; in a row as listed where it runs in circles."""
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(edge for edge in edges if set(edge) <= set(names))
    if not nx.is_directed_acyclic_graph(graph):
        return [[name] for name in names]
    return [sorted(generation, key=list(names).index) for generation in _latest(graph)]


def _latest(graph: nx.DiGraph) -> list[list[str]]:
    """Generations, each block as far to the right as what it feeds allows (an encoder stands next to its reader)."""
    backward = [list(generation) for generation in nx.topological_generations(graph.reverse())]
    return backward[::-1]


def _card(item: _Placed) -> Markup:
    card, x, y, width = item.card, item.x, item.y, item.width
    left, right, inner = x + PAD, x + width - PAD, width - 2 * PAD
    role_width = svg.text_width(card.role, SMALL)
    name = svg.fit(card.name, inner - role_width - 12, 16)
    body: list[str] = [
        svg.rect(x, y, width, card.height, rx=10, class_="card"),
        svg.text(left, y + 27, name, svg.tag("title", card.name), class_="block-name"),
        svg.text(right, y + 27, card.role, class_="small muted", text_anchor="end"),
        svg.text(left, y + 46, card.params, class_="normal muted"),
    ]
    line = y + HEAD + LINE - 5
    for label, value in card.facts:
        body.append(svg.text(left, line, label, class_="normal muted"))
        body.append(svg.text(right, line, value, class_="normal figure", text_anchor="end"))
        line += LINE
    line += 16
    body.append(svg.line(left, line - 26, right, line - 26, class_="rule"))
    body.append(svg.text(left, line - 4, "communication per step", class_="small strong"))
    if not card.transfers:
        body.append(svg.text(left, line + 17, "none", class_="normal muted"))
    for transfer in card.transfers:
        body.append(_transfer(transfer, card.longest, left, line + 15, inner))
        line += TRANSFER
    return svg.group(*body)


def _transfer(transfer: Transfer, longest: float, x: float, y: float, width: float) -> Markup:
    kind = kinds.words(transfer.kind)
    label = kind if transfer.purpose in ("", transfer.kind) else f"{kind} · {transfer.purpose}"
    seen, place = transfer_words(transfer)
    words = f"{seen}, {place}"
    hidden, exposed = (width * part / longest if longest else 0.0 for part in (transfer.hidden, transfer.exposed))
    exposed = max(exposed, 2.0) if transfer.exposed else 0.0
    hidden = min(hidden, width - exposed)
    style = kinds.work_class(transfer.kind)
    return svg.group(
        svg.tag("title", f"{label}, {transfer.count:,} per step: {words}"),
        svg.text(x, y, svg.first_fit((label, kind), width - 70, NORMAL), class_="normal"),
        svg.text(x + width, y, seconds_text(transfer.seconds), class_="normal figure", text_anchor="end"),
        svg.rect(x, y + 6, width, 6, rx=1, class_="track"),
        svg.rect(x, y + 6, hidden, 6, class_=f"hidden {style}"),
        svg.rect(x + hidden, y + 6, exposed, 6, class_="exposed"),
        svg.text(x, y + 26, svg.first_fit((words, seen), width, SMALL), class_="small muted"),
    )


def transfer_words(transfer: Transfer) -> tuple[str, str]:
    """("890 ms hidden, 12.2 ms exposed", "between nodes")."""
    if not transfer.exposed:
        seen = "all hidden"
    elif not transfer.hidden:
        seen = "all exposed"
    else:
        seen = f"{seconds_text(transfer.hidden)} hidden, {seconds_text(transfer.exposed)} exposed"
    return seen, kinds.STREAM_WORDS.get(transfer.stream, transfer.stream)


def _flow_words(flow: Flow) -> str:
    return f"{bytes_text(flow.nbytes)} per micro-batch"


def _side_arrows(flows: Sequence[Flow], placed: Mapping[str, _Placed]) -> list[Markup]:
    """Curves from the right edge of a card to the left edge of another, spread over it where several arrive."""
    body = []
    for flow in flows:
        source, target = placed[flow.source], placed[flow.target]
        if source is target:
            continue
        arriving = sorted((placed[f.source].middle, i) for i, f in enumerate(flows) if f.target == flow.target)
        place = next(rank for rank, (_, i) in enumerate(arriving) if flows[i] is flow)
        y2 = target.middle + 34 * (place - (len(arriving) - 1) / 2)
        x1, y1, x2 = source.x + source.width, source.middle, target.x
        if len(arriving) == 1 and source.y < y2 < source.y + source.card.height:
            y1 = y2
        body.append(_curve(x1, y1, x2, y2))
        x, above, below = _beside(x1, y1, x2, y2)
        body.append(svg.text(x, above, bytes_text(flow.nbytes), class_="small strong", text_anchor="middle"))
        body.append(svg.text(x, below, "per micro-batch", class_="small muted", text_anchor="middle"))
    return body


def _beside(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float]:
    """(x, y, y) of two lines of words: on both sides of a level arrow, otherwise on the side it bends away from."""
    if abs(y1 - y2) < 1:
        return (x1 + x2) / 2 - 3, y1 - 8, y1 + 16
    x = x1 + 10 + svg.text_width("per micro-batch", SMALL) / 2
    return (x, y1 - 21, y1 - 7) if y2 > y1 else (x, y1 + 17, y1 + 31)


def _curve(x1: float, y1: float, x2: float, y2: float) -> Markup:
    end, middle = x2 - 8, (x1 + x2) / 2
    n = svg.number
    path = f"M{n(x1)} {n(y1)}C{n(middle)} {n(y1)} {n(middle)} {n(y2)} {n(end)} {n(y2)}"
    head = f"M{n(x2 - 1)} {n(y2)}l-9 -4.5v9z"
    return svg.group(svg.tag("path", d=path, class_="arrow"), svg.tag("path", d=head, class_="arrow-head"))


def _down_arrows(flows: Sequence[Flow], placed: Mapping[str, _Placed], lanes: Mapping[Flow, float]) -> list[Markup]:
    body = []
    n = svg.number
    told: dict[str, int] = {}
    for flow in flows:
        source, target = placed[flow.source], placed[flow.target]
        if source is target:
            continue
        x = target.x + 26
        if flow in lanes:
            lane = lanes[flow]
            y1, y2 = source.middle, target.y + 27
            path, head = (
                f"M{n(source.x)} {n(y1)}H{n(lane)}V{n(y2)}H{n(target.x - 8)}",
                f"M{n(target.x - 1)} {n(y2)}l-9 -4.5v9z",
            )
        else:
            path, head = (
                f"M{n(x)} {n(source.y + source.card.height)}V{n(target.y - 8)}",
                f"M{n(x)} {n(target.y - 1)}l-4.5 -9h9z",
            )
        body += [svg.tag("path", d=path, class_="arrow"), svg.tag("path", d=head, class_="arrow-head")]
        row = told[flow.target] = told.get(flow.target, 0) + 1
        words = f"{flow.source} to {flow.target}: {_flow_words(flow)}"
        words = svg.fit(words, NARROW_CARD - 50, SMALL)
        body.append(svg.text(x + 14, target.y - 8 - 16 * (row - 1) - 4, words, class_="small halo"))
    return body
