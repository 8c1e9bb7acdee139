"""A Program as a person reads it: the tree of blocks and segments with what each costs."""

from __future__ import annotations

import sympy
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from omnicompile.program import Phase, Program, Segment, Sym
from omnicompile.recompute import Recompute
from omnicompile.report import figures
from omnicompile.report.json_view import number, saved_bytes, segment_flops
from omnicompile.report.terminal import FULL_WIDTH, columns, render
from omnicompile.report.units import bytes_text, count_text, flops_text

Values = dict[sympy.Symbol, float]
SYMBOL_WORDS = ((Sym.S, "tokens"), (Sym.I, "images"), (Sym.N, "patches"), (Sym.C, "clips"), (Sym.A, "audio frames"))
LEGEND = (
    "forward, backward: FLOPs, attention without the causal discount",
    "saved: kept for the backward without recompute; selective, full: with it",
)
COLUMNS = ("", "count", "params", "forward", "backward", "saved", "selective", "full")
SHOWN_POLICIES = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)


def program_text(program: Program, values: Values, width: int | None = None, color: bool = False) -> str:
    """The report of `omnicompile inspect`: per segment the sum over its instances, for one sample on one device."""
    parts: list[RenderableType] = [_title(program)]
    parts += [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in (_sample_words(values), *LEGEND)]
    parts += [Text(""), _tree(program, values, columns(width) < FULL_WIDTH)]
    if program.edges:
        parts.append(Text("\nBetween blocks", style="bold cyan"))
    for edge in program.edges:
        parts.append(Text(f"  {edge.source} -> {edge.target}: {bytes_text(number(edge.nbytes, values))}"))
    if program.notes:
        parts.append(Text("\nNotes", style="bold cyan"))
        parts += [Padding(Text(f"- {note}"), (0, 0, 0, 2)) for note in program.notes]
    return render(Group(*parts), width, color)


def _title(program: Program) -> Text:
    total, active = program.param_count, figures.active_param_count(program)
    words = f": {count_text(total)} parameters" + (f", {count_text(active)} active per token" if active < total else "")
    return Text.assemble((program.name, "bold"), words)


def _sample_words(values: Values) -> str:
    shown = [f"{values[symbol]:,.0f} {word}" for symbol, word in SYMBOL_WORDS if values.get(symbol)]
    return "one sample of " + ", ".join(shown) + ", on one device"


def _tree(program: Program, values: Values, narrow: bool) -> Table:
    """narrow: without roles, module paths and what recompute would keep."""
    shown = COLUMNS[:-2] if narrow else COLUMNS
    table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="dim", pad_edge=False)
    for name in shown:
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))

    def add(label: Text, count: str, sums: list[float], style: str = "") -> None:
        cells: list[Text | str] = [label, count, *_words(sums)]
        table.add_row(*cells[: len(shown)], style=style)

    rows = {block.name: [_sums(s, values) for s in program.block_segments(block.name)] for block in program.blocks}
    for block in program.blocks:
        path = f" {block.path}" if block.path and block.path != block.name and not narrow else ""
        add(Text(f"{block.name} ({block.kind}){path}"), "", _total(rows[block.name]), "bold")
        segments = program.block_segments(block.name)
        for index, segment in enumerate(segments):
            branch = "└ " if index == len(segments) - 1 else "├ "
            role = "" if narrow else f" ({segment.role})"
            add(Text(f"{branch}{segment.name}{role}"), str(segment.count), rows[block.name][index])
    add(Text("total"), "", _total([row for block_rows in rows.values() for row in block_rows]), "bold")
    return table


def _total(rows: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows)]


def _sums(segment: Segment, values: Values) -> list[float]:
    """Parameters, forward FLOPs, backward FLOPs, and saved bytes under each policy, over all instances."""
    saved = saved_bytes(segment, values)
    each = [
        segment.param_count,
        segment_flops(segment, Phase.FORWARD, values),
        segment_flops(segment, Phase.BACKWARD, values),
        *(saved.get(policy, 0.0) for policy in SHOWN_POLICIES),
    ]
    return [segment.count * value for value in each]


def _words(sums: list[float]) -> list[str]:
    if not sums:
        return [""] * 6
    params, forward, backward, *saved = sums
    return [count_text(params), flops_text(forward), flops_text(backward), *(bytes_text(value) for value in saved)]
