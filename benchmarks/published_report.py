"""The report of `accuracy.py`: Markdown for people, and the same as data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from published_runs import Outcome
from published_specs import Skipped
from published_statistics import (
    SWEEP_LAYOUTS,
    SWEEP_TOLERANCE,
    Errors,
    corrected,
    corrected_by_others,
    errors,
    factor,
    grouped,
    headline,
    is_h100_or_a100,
    likely_cause,
    memory_headline,
    memory_ratios,
    parallelism,
    plain,
    ratios,
    sweeps,
    timed,
)

GIB = 2.0**30
WORST = 10


def skip_reasons(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> Counter[tuple[str, str]]:
    """Rows by (reason, suite). A refusal of the pricing counts without its numbers."""
    found = Counter((s.reason, s.suite) for s in skipped)
    found.update((f"not priced: {re.sub(r'[0-9]+', 'N', o.refused)}", o.spec.suite) for o in outcomes if o.refused)
    return found


def markdown(outcomes: Sequence[Outcome], skipped: Sequence[Skipped], command: str, constants: str = "") -> str:
    """constants: what those of the cost model were fitted on, in words."""
    lines = ["# Predicted against published runs", "", f"Printed by `{command}`. {constants}".rstrip(), ""]
    lines += _coverage(outcomes, skipped)
    lines += _headlines(outcomes)
    lines += _times(outcomes)
    lines += _memory(outcomes)
    lines += _sweeps(outcomes)
    lines += _worst(outcomes)
    return "\n".join([*lines, *_skips(outcomes, skipped)]) + "\n"


def _coverage(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> list[str]:
    given = len(outcomes) + len(skipped)
    priced = [o for o in outcomes if not o.refused]
    time, weak = timed(outcomes), timed(outcomes, weak=True)
    return [
        f"{len(priced)} of {given} rows are predicted: {len(time)} step times that count, {len(weak)} that do not "
        f"(their rows leave too much open), {len(memory_ratios(outcomes))} peak memories. The others, with reasons, "
        "are below.",
        "",
    ]  # fmt: skip


def _headlines(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["## Step time", ""]
    eras = (
        ("all", outcomes),
        ("fused attention", [o for o in outcomes if o.spec.modern]),
        ("earlier", [o for o in outcomes if not o.spec.modern]),
    )
    cells = []
    for name, group in eras:
        raw, then, others = (headline(group, way) for way in (plain, corrected, corrected_by_others))
        if raw and then:
            beside = [f"{others.median:.1%}", f"{others.p90:.1%}"] if others else ["-", "-"]
            cells.append([name, *_cells(raw), f"**{then.median:.1%}**", f"**{then.p90:.1%}**", *beside])
    if cells:
        lines += ["H100 and A100, medians over publishers of the publisher's median and 90th percentile:"]
        header = ("rows", "rows", "median", "p90", "bias", "median then", "p90 then", "by others", "p90 by others")
        lines += [*table(header, cells), ""]
    return [
        *lines,
        "Error: predicted / measured - 1. Bias: its median with sign. Factor: of one publisher, the median of "
        "measured / predicted; then: the errors when predictions are multiplied by it. By others: "
        "when each row is multiplied by the factor of the publisher's other rows.",
    ]


def _times(outcomes: Sequence[Outcome]) -> list[str]:
    rows = timed(outcomes)
    lines: list[str] = []
    total = [("all", rows)] if rows else []
    eras = [(name, [o for o in rows if o.spec.modern == modern]) for name, modern in
            (("fused attention", True), ("unfused attention", False))]  # fmt: skip
    lines += _time_table("rows", [*total, *eras])
    lines += _time_table("publisher", grouped(rows, lambda o: [o.spec.suite]).items())
    lines += _time_table("parallelism", grouped(rows, parallelism).items())
    lines += _time_table("GPU", grouped(rows, lambda o: [o.spec.gpu_text]).items())
    weak = grouped(timed(outcomes, weak=True), lambda o: [f"{o.spec.suite}: {o.spec.weak}"])
    return lines + (_time_table("does not count", weak.items()) if weak else [])


def _time_table(title: str, groups: Any, values_of: Callable[[Sequence[Outcome]], list[float]] = ratios) -> list[str]:
    cells = []
    for name, group in groups:
        values = values_of(group)
        if values:
            then = corrected(values)
            after = [f"{factor(values):.3f}", f"{then.median:.1%}", f"{then.p90:.1%}"]
            cells.append([name, *_cells(plain(values)), *after])
    return table((title, "rows", "median", "p90", "bias", "factor", "median then", "p90 then"), cells)


def _cells(found: Errors) -> list[str]:
    return [str(found.rows), f"{found.median:.1%}", f"{found.p90:.1%}", f"{found.bias:+.1%}"]


def _memory(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [o for o in outcomes if o.memory_ratio is not None]
    if not rows:
        return []
    lines = [
        "", "## Peak memory", "",
        "Allocated: bytes of tensors. Reserved: with the allocator's slack. Device: with the context too. Values are "
        "taken as GiB, whatever their label.",
    ]  # fmt: skip
    raw, then = memory_headline(outcomes, plain), memory_headline(outcomes, corrected)
    if raw and then:
        lines += [
            "",
            f"Rows that count, medians over publishers: median error **{raw.median:.1%}**, 90th percentile "
            f"{raw.p90:.1%}; after one factor per publisher **{then.median:.1%}** and {then.p90:.1%}.",
        ]
    groups = {"all": rows} | grouped(rows, _memory_group)
    return lines + _time_table("publisher", groups.items(), memory_ratios)


def _memory_group(outcome: Outcome) -> list[str]:
    weak = ", does not count" if outcome.spec.weak else ""
    return [f"{outcome.spec.suite}, {outcome.spec.memory_kind}{weak}"]


def _sweeps(outcomes: Sequence[Outcome]) -> list[str]:
    found = sweeps(outcomes)
    if not found:
        return []
    hits = sum(s.hit for s in found)
    regret = sum(s.regret for s in found) / len(found)
    lines = [
        "", "## Which layout is best", "",
        f"{len(found)} sweeps of at least {SWEEP_LAYOUTS} layouts of one model, machine, length and batch. In {hits} "
        f"of them ({hits / len(found):.0%}) the predicted best is the measured best or within {SWEEP_TOLERANCE:.0%} of "
        f"it; it takes {regret:.1%} longer on average. A layout taken by chance would be in "
        f"{sum(s.by_chance[1] for s in found) / len(found):.0%} of them, and take "
        f"{sum(s.by_chance[0] for s in found) / len(found):.0%} longer.",
    ]  # fmt: skip
    cells = [
        [s.suite, s.model, s.gpus, s.seq_len, s.global_batch, s.layouts, s.predicted_best, s.measured_best,
         f"{s.regret:.1%}", f"{s.by_chance[0]:.0%}"]
        for s in found
    ]  # fmt: skip
    header = (
        "publisher", "model", "GPUs", "length", "batch", "layouts", "predicted best", "measured best", "longer",
        "by chance",
    )  # fmt: skip
    return lines + table(header, cells)


def _worst(outcomes: Sequence[Outcome]) -> list[str]:
    rows = sorted(timed(outcomes), key=lambda o: -abs((o.ratio or 1) - 1))[:WORST]
    cells = [
        [o.spec.id, o.spec.model.name, o.spec.gpus, f"{o.spec.seconds:.4g}", f"{o.seconds:.4g}",
         f"{(o.ratio or 1) - 1:+.0%}", likely_cause(o)]
        for o in rows
    ]  # fmt: skip
    header = ("row", "model", "GPUs", "measured s", "predicted s", "error", "likely cause")
    return ["", f"## The {len(rows)} largest errors of step time", *table(header, cells)] if rows else []


def _skips(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> list[str]:
    found = skip_reasons(outcomes, skipped)
    if not found:
        return []
    reasons: Counter[str] = Counter()
    for (reason, _), count in found.items():
        reasons[reason] += count
    cells = [
        [reason, total, ", ".join(f"{s} {n}" for (r, s), n in sorted(found.items()) if r == reason)]
        for reason, total in reasons.most_common()
    ]
    return ["", "## Rows that are not predicted", *table(("reason", "rows", "publishers"), cells)]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]


def data(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Everything as plain values: seconds, bytes, ratios of predicted over measured."""
    raw, then = headline(outcomes, plain), headline(outcomes, corrected)
    by_suite = grouped(timed(outcomes), lambda o: [o.spec.suite])
    return {
        "headline": asdict(raw) if raw else None,
        "headline_after_factors": asdict(then) if then else None,
        "publishers": {n: asdict(errors(ratios(g))) | {"factor": factor(ratios(g))} for n, g in by_suite.items()},
        "sweeps": [asdict(s) | {"hit": s.hit} for s in sweeps(outcomes)],
        "rows": [_row_data(o) for o in outcomes],
        "skipped": [asdict(s) for s in skipped],
    }


def _row_data(outcome: Outcome) -> dict[str, Any]:
    spec, prediction = outcome.spec, outcome.prediction
    found: dict[str, Any] = {
        "id": spec.id, "publisher": spec.suite, "model": spec.model.name, "gpu": spec.gpu_text, "gpus": spec.gpus,
        "seq_len": spec.seq_len, "global_batch": spec.global_batch, "layout": outcome.layout,
        "measured_seconds": spec.seconds, "measured_from": spec.seconds_from, "measured_memory": spec.memory,
        "memory_kind": spec.memory_kind, "weak": spec.weak, "assumed": list(spec.assumed),
        "h100_or_a100": is_h100_or_a100(outcome), "modern": spec.modern, "refused": outcome.refused,
    }  # fmt: skip
    if prediction is not None:
        found |= {
            "predicted_seconds": prediction.step_seconds, "ratio": outcome.ratio, "predicted_memory": outcome.memory,
            "memory_ratio": outcome.memory_ratio, "likely_cause": likely_cause(outcome),
            "time": {kind: seconds for kind, seconds in prediction.time.items() if seconds},
            "memory": {kind: nbytes for kind, nbytes in prediction.memory.items() if nbytes},
        }  # fmt: skip
    return {key: value for key, value in found.items() if value not in (None, "", [])}


def explain(outcome: Outcome) -> str:
    """The parts of one prediction."""
    spec, prediction = outcome.spec, outcome.prediction
    lines = [
        f"{spec.id}  {spec.model.name}, {outcome.parameters / 1e9:.4g} B parameters, {spec.gpus} x {spec.gpu_text}",
        f"  sample  {spec.seq_len:,} tokens, {spec.global_batch} a step",
        f"  layout  {', '.join(f'{k}={v}' for k, v in sorted(outcome.layout.items()))}",
        f"  stack   {spec.layout.framework}; assumed: {'; '.join(spec.assumed) or 'nothing'}",
        f"  network {spec.hardware.inter_link.bytes_per_second / 1e9:.4g} GB/s a GPU between nodes, memory "
        f"{spec.hardware.memory_bandwidth / 1e12:.4g} TB/s, sustained {spec.hardware.sustained_fraction:.3f}",
        f"  config  {spec.model.config}",
    ]  # fmt: skip
    if prediction is None:
        return "\n".join([*lines, f"not priced: {outcome.refused}"])
    if spec.seconds is not None:
        lines.append(
            f"Step  predicted {prediction.step_seconds:.4g} s, measured {spec.seconds:.4g} s ({spec.seconds_from}): "
            f"{(outcome.ratio or 0) - 1:+.1%}; {likely_cause(outcome)}"
        )
    for kind, seconds in sorted(prediction.time.items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:28} {seconds:10.4g} s {seconds / prediction.step_seconds:7.1%}")
    if spec.memory is not None:
        lines.append(
            f"Memory  predicted {outcome.memory / GIB:.4g} GiB {spec.memory_kind}, measured "
            f"{spec.memory / GIB:.4g} GiB: {(outcome.memory_ratio or 0) - 1:+.1%}"
        )
    else:
        total, size = prediction.memory_total / GIB, spec.hardware.memory_bytes / GIB
        lines.append(f"Memory  predicted {total:.4g} GiB of {size:.4g}")
    for kind, nbytes in sorted(prediction.memory.items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:28} {nbytes / GIB:10.4g} GiB")
    return "\n".join(lines)
