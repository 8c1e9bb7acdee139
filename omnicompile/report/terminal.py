"""A Plan as a person reads it in a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from omnicompile.plan import BlockPlan, Plan, Prediction
from omnicompile.program import Program
from omnicompile.report import figures
from omnicompile.report.units import count_text, digits, gib, percent, seconds_text

MIN_WIDTH, MAX_WIDTH = 60, 120
FULL_WIDTH = 96  # below it tables are set closer
BAR = 28


def plan_text(
    plan: Plan,
    program: Program | None = None,
    alternatives: Sequence[Plan] = (),
    reasons: Sequence[str] = (),
    width: int | None = None,
    color: bool = False,
) -> str:
    """The whole report. program: adds parameter counts. alternatives / reasons: the next best plans and why each lost.
    width: columns (None: those of the terminal, at most 120). color: with terminal escapes."""
    parts: list[RenderableType] = [_title(plan), _indent(_summary(plan, program)), _heading("Blocks")]
    parts.append(_indent(_blocks(plan, program, columns(width) < FULL_WIDTH)))
    if plan.prediction is not None:
        parts += [*_memory(plan.prediction), *_time(plan.prediction)]
    if alternatives:
        parts += [
            _heading("Next best", "tokens/s/GPU against the plan above, and why it lost"),
            _indent(_alternatives(plan, alternatives, reasons)),
        ]
    if plan.notes:
        parts += [_heading("Notes"), *(_indent(Text(f"- {note}")) for note in plan.notes)]
    return render(Group(*parts), width, color)


def render(body: RenderableType, width: int | None = None, color: bool = False) -> str:
    """`body` as text without trailing blanks."""
    file = StringIO()
    console = Console(
        file=file,
        width=columns(width),
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        legacy_windows=False,
    )
    console.print(body)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def columns(width: int | None) -> int:
    """`width`, or that of the terminal up to MAX_WIDTH; at least MIN_WIDTH."""
    found = min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH) if width is None else width
    return max(found, MIN_WIDTH)


def _title(plan: Plan) -> Text:
    return Text.assemble((plan.model, "bold"), f" on {figures.cluster_words(plan.cluster)}")


def _heading(text: str, detail: str = "") -> Text:
    return Text.assemble("\n", (text, "bold cyan"), f"  {detail}" if detail else "")


def _indent(body: RenderableType) -> Padding:
    return Padding(body, (0, 0, 0, 2))


def _summary(plan: Plan, program: Program | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if program is not None:
        table.add_row("model", figures.model_words(program))
    table.add_row("sample", figures.sample_words(plan, program))
    table.add_row("step", figures.step_words(plan))
    table.add_row("mesh", figures.rank_words(plan.mesh))
    table.add_row("options", figures.option_words(plan))
    if plan.prediction is None:
        table.add_row("speed", "not priced")
        return table
    table.add_row("speed", _speed_words(plan.prediction))
    if (hours := figures.gpu_hours_per_billion_tokens(plan.prediction)) is not None:
        cost = figures.cost_per_billion_tokens(plan)
        price = "" if cost is None else f", costing {digits(cost)} at {plan.cluster.price_per_gpu_hour:g} per GPU-hour"
        table.add_row("cost", f"{digits(hours)} GPU-hours per billion tokens{price}")
    return table


def _speed_words(prediction: Prediction) -> Text:
    return Text.assemble(
        (f"{digits(prediction.tokens_per_second_per_gpu)} tokens/s/GPU", "bold green"),
        f", {seconds_text(prediction.step_seconds)} per step, ",
        (f"MFU {percent(prediction.mfu)}", "bold green"),
        f" (causal; {percent(prediction.mfu_paper)} by VeOmni's counting)",
    )


def _blocks(plan: Plan, program: Program | None, narrow: bool) -> Table:
    table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("block", "params", "sharding", "activations", "sp", "ep", "recompute", "memory", "time"):
        numeric = name in ("params", "sp", "ep", "memory", "time")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for name, block in plan.blocks.items():
        table.add_row(*_block_row(name, block, plan.prediction, program))
    return table


def _block_row(name: str, block: BlockPlan, prediction: Prediction | None, program: Program | None) -> list[str]:
    params = "-" if program is None else count_text(figures.block_params(program, name))
    memory = None if prediction is None else prediction.block_memory.get(name)
    time = None if prediction is None else prediction.block_time.get(name)
    return [
        f"{name} (frozen)" if block.frozen else name,
        params,
        figures.sharding_words(block),
        figures.LAYOUT_WORDS[block.layout],
        str(block.sp) if block.sp > 1 else "-",
        str(block.ep) if block.ep > 1 else "-",
        figures.recompute_words(block),
        "-" if memory is None else gib(memory),
        "-" if time is None else seconds_text(time),
    ]


def _memory(prediction: Prediction) -> list[RenderableType]:
    total, capacity = prediction.memory_total, prediction.memory_capacity
    detail = f"{gib(total)} of {gib(capacity)} per GPU ({percent(total / capacity) if capacity else '-'})"
    if not prediction.fits:
        detail += f", {gib(total - capacity)} TOO MUCH"
    rows = {name: value for name, value in prediction.memory.items() if value > 0}
    table = _bars(rows, {name: gib(value) for name, value in rows.items()}, capacity, "blue")
    free = capacity - total
    if free > 0:
        table.add_row(Text("free", style="dim"), gib(free), percent(free / capacity), _bar(free / capacity, "dim"))
    return [_heading("Memory", detail), _indent(table)]


def _time(prediction: Prediction) -> list[RenderableType]:
    shown, hidden = figures.step_parts(prediction)
    rows = {name.replace("_", "-"): value for name, value in shown.items()}
    table = _bars(rows, {name: seconds_text(v) for name, v in rows.items()}, prediction.step_seconds, "green")
    for name, value in hidden.items():
        share = value / prediction.step_seconds if prediction.step_seconds else 0.0
        label = Text(name.replace("_", "-"), style="dim")
        table.add_row(label, seconds_text(value), percent(share), _bar(share, "dim", "░"))
    detail = seconds_text(prediction.step_seconds)
    if hidden:
        detail += f", and {seconds_text(sum(hidden.values()))} of transfers hidden behind compute (░)"
    return [_heading("Step time", detail), _indent(table)]


def _bars(values: dict[str, float], texts: dict[str, str], whole: float, style: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=20)
    table.add_column(justify="right", min_width=10)
    table.add_column(justify="right", min_width=6)
    table.add_column()
    for name, value in values.items():
        share = value / whole if whole else 0.0
        exposed = "red" if name.startswith("exposed") else style
        table.add_row(name, texts[name], percent(share), _bar(share, exposed))
    return table


def _bar(share: float, style: str, glyph: str = "█") -> Text:
    """A bar of up to BAR cells, to an eighth of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    whole, rest = divmod(eighths, 8)
    if glyph != "█":
        return Text(glyph * max(1, whole), style=style)
    return Text(glyph * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest], style=style)


def _alternatives(best: Plan, plans: Sequence[Plan], reasons: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for index, plan in enumerate(plans):
        choice = Text("; ".join(figures.differences(plan, best)) or "the same choices")
        reason = reasons[index] if index < len(reasons) else ""
        body = Group(choice, Text(reason, style="dim")) if reason else choice
        table.add_row(str(index + 2), figures.slower_words(plan, best), body)
    return table
