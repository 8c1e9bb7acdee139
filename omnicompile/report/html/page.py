"""The whole page: what it says, put into `page.html.j2`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from omnicompile.picture import Curve, Picture, Transfer
from omnicompile.plan import Plan, Prediction
from omnicompile.program import Program
from omnicompile.recipe import dumps
from omnicompile.report import figures
from omnicompile.report.html import curves, diagram, kinds, parts, timeline
from omnicompile.report.html.svg import clean
from omnicompile.report.units import count_text, digits, gib, percent, plural, seconds_text


@dataclass(frozen=True)
class Page:
    """What is shown. plans: the one of the page, then the next best; reasons: why each lost ("" for the first).
    curves: over sample lengths and over GPU counts. command: as it was typed. made: when and with what. searched: what
    the search looked at ("" if there was none)."""

    plans: Sequence[Plan]
    reasons: Sequence[str]
    program: Program
    picture: Picture
    curves: Sequence[Curve]
    command: str
    made: str
    searched: str = ""


@dataclass(frozen=True)
class Figure:
    """A number that stands large at the head. share: how full a bar below it is (None: no bar)."""

    name: str
    value: str
    unit: str
    detail: str
    share: float | None = None
    bad: bool = False


def page_html(page: Page) -> str:
    """The page as text. Raises ValueError if its plan is not priced."""
    plan, prediction = page.plans[0], page.plans[0].prediction
    if prediction is None:
        raise ValueError("the plan is not priced")
    program, picture = page.program, page.picture
    cards = diagram.cards(plan, program, picture)
    hidden = figures.step_parts(prediction)[1]
    return _template().render(
        page=page,
        title=f"{program.name} on {plan.cluster.gpus:,} x {plan.cluster.gpu}",
        cluster=figures.cluster_words(plan.cluster),
        figures=_figures(plan, prediction),
        facts=_facts(plan, program),
        wide=diagram.wide_diagram(program, cards, picture.flows) if diagram.is_wide(program) else None,
        tall=diagram.tall_diagram(cards, picture.flows),
        block_heads=("block", "params", *diagram.block_facts(plan, next(iter(plan.blocks)))),
        block_rows=[_block_row(plan, program, name) for name in plan.blocks],
        transfer_rows=[_transfer_row(t) for card in cards for t in card.transfers],
        memory_bars=parts.memory_bars(prediction, picture),
        memory_heads=("whole GPU", *picture.memory, parts.NO_BLOCK),
        memory_rows=parts.memory_rows(prediction, picture),
        step_bars=parts.step_bars(prediction),
        step_tables=parts.step_tables(prediction),
        step_words=seconds_text(prediction.step_seconds),
        hidden_words=seconds_text(sum(hidden.values())) if hidden else "",
        lanes=timeline.timeline(picture),
        lane_names=timeline.lane_names(),
        lane_height=timeline.HEIGHT,
        legend=timeline.legend(picture),
        micro_steps=plan.accumulation,
        charts=_charts(page.curves, prediction),
        planned=any(curve.planned for curve in page.curves),
        misfits=any(curves.any_misfit(curve) for curve in page.curves),
        point_tables=[(curves.AXIS_WORDS[curve.axis], curves.point_rows(curve)) for curve in page.curves],
        alternatives=[_alternative(page, number) for number in range(1, len(page.plans))],
        recipe=dumps(plan),
    )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("omnicompile.report", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if isinstance(value, str) else value,
    )
    return environment.get_template("page.html.j2")


def _figures(plan: Plan, prediction: Prediction) -> list[Figure]:
    total, capacity = prediction.memory_total, prediction.memory_capacity
    over = "" if prediction.fits else f"{gib(total - capacity)} too much for the {gib(capacity)} of a GPU"
    used = total / capacity if capacity else 0.0
    memory = gib(total).partition(" ")
    step = seconds_text(prediction.step_seconds).rpartition(" ")
    found = [
        Figure(
            "Throughput",
            digits(prediction.tokens_per_second_per_gpu),
            "tokens/s/GPU",
            _all_gpus(plan, prediction),
        ),
        Figure("Step", step[0], step[2], f"{count_text(plan.global_batch * plan.workload.seq_len)} tokens per step"),
        Figure("MFU", percent(prediction.mfu), "", f"causal; {percent(prediction.mfu_paper)} by VeOmni's counting"),
        Figure(
            "Memory",
            memory[0],
            memory[2],
            over or f"of {gib(capacity)} per GPU ({percent(used)})",
            min(used, 1.0),
            bool(over),
        ),
    ]
    hours, cost = figures.gpu_hours_per_billion_tokens(prediction), figures.cost_per_billion_tokens(plan)
    if cost is not None and hours is not None:
        detail = f"per billion tokens: {digits(hours)} GPU-hours at {plan.cluster.price_per_gpu_hour:g}"
        found.append(Figure("Cost", digits(cost), "", detail))
    elif hours is not None:
        found.append(Figure("Cost", digits(hours), "GPU-hours", "per billion tokens"))
    return found


def _all_gpus(plan: Plan, prediction: Prediction) -> str:
    rate = count_text(prediction.tokens_per_second_per_gpu * plan.cluster.gpus)
    return f"{rate} tokens/s on {plural(plan.cluster.gpus, 'GPU')}"


def _facts(plan: Plan, program: Program) -> dict[str, str]:
    return {
        "model": figures.model_words(program),
        "sample": figures.sample_words(plan, program),
        "step": figures.step_words(plan),
        "mesh": figures.rank_words(plan.mesh),
        "options": figures.option_words(plan),
    }


def _block_row(plan: Plan, program: Program, name: str) -> tuple[str, ...]:
    label = f"{name} (frozen)" if plan.blocks[name].frozen else name
    return label, count_text(figures.block_params(program, name)), *diagram.block_facts(plan, name).values()


def _transfer_row(transfer: Transfer) -> tuple[str, ...]:
    where = kinds.STREAM_WORDS.get(transfer.stream, transfer.stream)
    times = [seconds_text(value) if value else "-" for value in (transfer.hidden, transfer.exposed)]
    return transfer.block, kinds.words(transfer.kind), transfer.purpose, where, f"{transfer.count:,}", *times


def _charts(found: Sequence[Curve], prediction: Prediction) -> list[Markup]:
    memory = curves.memory_measure(prediction.memory_capacity)
    return [
        curves.chart(f"{name}-{curve.axis.replace('_', '-')}", curve, measure)
        for curve in found
        for name, measure in (("throughput", curves.THROUGHPUT), ("memory", memory))
    ]


def _alternative(page: Page, number: int) -> tuple[str, ...]:
    best, plan = page.plans[0], page.plans[number]
    prediction = plan.prediction
    speed = digits(prediction.tokens_per_second_per_gpu) if prediction is not None else "-"
    memory = gib(prediction.memory_total) if prediction is not None else "-"
    choice = "; ".join(figures.differences(plan, best)) or "the same choices"
    reason = page.reasons[number] if number < len(page.reasons) else ""
    return str(number + 1), figures.slower_words(plan, best), speed, memory, choice, reason
