"""The paper's figures 4 to 6a and VeOmni's published performance figure, as our cost model predicts them.

For each SP (and EP): the longest sequence that fits, and per length tokens/s/GPU and MFU in two ways of counting, of
two plans. "paper": the paper's choices pinned (everything sharded over all GPUs, every layer recomputed, chunked
loss, nothing offloaded, one sample per micro-batch). "best": our planner's best plan at that SP and EP. Beside them
stands what the paper states. Nothing is fitted to what is compared; hardware constants are those of the package.

    python benchmarks/paper_figures.py [--only fig4 fig5 fig6a veomni] [--quick] [--out DIRECTORY]

Writes paper_figures.json and paper_figures.md. No GPU is needed; all figures take a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paper_points import (
    FIGURES,
    HERE,
    HOST_TB,
    KINDS,
    ROOT,
    VEOMNI_GPUS,
    VEOMNI_MODEL,
    K,
    Longest,
    Point,
    Result,
    figure_result,
    quick,
    veomni_points,
)


def main() -> int:
    args = _arguments()
    names = args.only or [*(f.name for f in FIGURES), "veomni"]
    results = [figure_result(quick(f) if args.quick else f) for f in FIGURES if f.name in names]
    points = veomni_points(args.quick) if "veomni" in names else []
    args.out.mkdir(parents=True, exist_ok=True)
    environment = _environment()
    data = {"environment": environment, "figures": [asdict(r) for r in results], "veomni": points}
    (args.out / "paper_figures.json").write_text(json_text(data))
    text = markdown(results, points, environment)
    (args.out / "paper_figures.md").write_text(text)
    print(text)
    return 1 if any(p.error for r in results for p in r.points) else 0


def json_text(data: Any) -> str:
    """JSON with five significant digits and a line per point."""
    return json.dumps(_rounded(data)).replace(', {"', ',\n{"') + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*(f.name for f in FIGURES), "veomni"], help="only these figures")
    parser.add_argument("--quick", action="store_true", help="one SP, one EP, one length: a test that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory of the results")
    return parser.parse_args()


def markdown(results: list[Result], points: list[dict[str, Any]], environment: dict[str, str]) -> str:
    lines = ["# The paper's figures, predicted", "", *ASSUMPTIONS, ""]
    lines += [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    for result in results:
        lines += _figure_text(result)
    return "\n".join(lines + (_veomni_text(points) if points else [])) + "\n"


ASSUMPTIONS = (
    "Predicted by the cost model for H100-80GB, 8 a node; nothing is measured here and nothing is tuned to the paper.",
    "Printed by `python benchmarks/paper_figures.py`. Assumed, because the paper does not state it: one sample that",
    "fills the context (not several packed ones) per micro-batch, one micro-batch per SP group and optimizer step, and",
    "H100 SXM with 400 Gb/s per GPU between nodes. Encoders are frozen; projectors and the language model are trained.",
    "",
    "- **paper**: the paper's choices pinned: parameters sharded over all GPUs (FSDP), every layer of the language",
    "  model recomputed, chunked loss, nothing offloaded. The layout of the encoders is left to the planner.",
    "- **whole logits**: the same without the chunked loss (the paper names an in-place cross-entropy).",
    "- **best**: the planner's best plan at that SP and EP that can be executed, free in recompute, sharding, layout",
    "  of the encoders and loss head. **with offload**: its best if what is priced only were there too, above all",
    "  keeping activations and optimizer state in host memory.",
    "- t/s: tokens/s/GPU. MFU: causal attention counted as half, frozen parts without weight gradients, recompute not",
    "  counted. VeOmni MFU: the paper's counting, 6 FLOPs per active parameter and token and full attention. GiB: per",
    "  GPU, of 79.1, CUDA context (1.4) and allocator slack (4.0) included. Host: host memory per node that offloading",
    "  takes. A dash: does not fit.",
)


def _figure_text(result: Result) -> list[str]:
    figure = result.figure
    lines = [f"## {figure.title}", "", f"Model: `{figure.model}`{figure.remark}; {result.workload}.", ""]
    lines += [f"Paper: {figure.stated}.", ""]
    lines += _stated_text(result)
    lines += ["Longest sequence that fits:", ""]
    lines += ["| SP | EP | paper's choices | with whole logits | best plan | with offload |"]
    lines += ["|---|---|---|---|---|---|"]
    degrees = [(sp, ep) for sp in figure.sps for ep in figure.eps]
    for sp, ep in degrees:
        limits = {e.plan: e for e in result.longest if (e.sp, e.ep) == (sp, ep)}
        lines.append(f"| {sp} | {ep} | {' | '.join(_limit_text(limits.get(kind)) for kind in KINDS)} |")
    for sp, ep in degrees:
        lines += ["", *_line_text(result, sp, ep)]
    what = "best at least as fast as pinned; memory and longest sequence monotone; MFU below 80%; host memory"
    lines += ["", f"Checks ({what} at most {HOST_TB:g} TB a node): {'' if result.checks else 'all hold'}", ""]
    return [*lines, *(f"- {check}" for check in result.checks), ""]


def _stated_text(result: Result) -> list[str]:
    """What the paper states beside what we predict at that length."""
    figure = result.figure
    length = f"{figure.stated_length // K}K"
    there = [p for p in result.points if p.fits and p.plan == "paper" and p.seq_len == figure.stated_length]
    lines = []
    for name, points in (("", there), (" with FlashAttention-2", result.older_attention)):
        for p in points:
            error = f" ({p.mfu_paper / figure.stated_mfu - 1:+.0%})" if figure.stated_mfu else ""
            speed = f"{p.speed:,.0f} t/s, VeOmni MFU {p.mfu_paper:.1%}{error}"
            lines.append(f"- {length}, SP {p.sp}, EP {p.ep}{name}: {speed}")
    if result.implied_speed:
        stated = f"The stated MFU means {result.implied_speed:,.0f} tokens/s/GPU at {length}. Predicted:"
        lines = [stated, "", *lines]
    elif lines:
        lines = [f"Predicted at {length} with the paper's choices:", "", *lines]
    return [*lines, ""] if lines else []


def _limit_text(entry: Longest | None) -> str:
    if entry is None or not entry.seq_len or entry.at is None:
        return "none"
    host = f", host {entry.at.host:.1f} TB" if entry.at.host else ""
    return f"{entry.seq_len / K:,.0f}K ({entry.at.speed:,.0f} t/s{host})"


def _line_text(result: Result, sp: int, ep: int) -> list[str]:
    figure = result.figure
    title = f"SP {sp}" + (f", EP {ep}" if len(figure.eps) > 1 else "")
    lines = [
        f"{title}:", "",
        "| length | paper t/s | MFU | VeOmni MFU | GiB | best t/s | MFU | VeOmni MFU | GiB | best plan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for seq_len in figure.lengths:
        points = {p.plan: p for p in result.points if (p.sp, p.ep, p.seq_len) == (sp, ep, seq_len)}
        paper, best = points["paper"], points["best"]
        chosen = best.choices if best.fits else best.error or "-"
        lines.append(f"| {seq_len // K}K | {_cells(paper)} | {_cells(best)} | {chosen} |")
    return lines


def _cells(point: Point) -> str:
    if not point.fits:
        return "- | - | - | -"
    return f"{point.speed:,.0f} | {point.mfu:.1%} | {point.mfu_paper:.1%} | {point.memory:.1f}"


def _veomni_text(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## VeOmni's performance figure, nine points", "",
        f"Assumed: Qwen2-72B's shape (`{VEOMNI_MODEL}`), {VEOMNI_GPUS} H100, FlashAttention-3, one sample per",
        "micro-batch and step, FSDP over all GPUs, full recompute, chunked loss, no offload. The figure",
        "states none of these. Its memory is compared with what we predict to be allocated (without CUDA context and",
        "allocator slack) and in all.", "",
        "| id | SP | length | t/s printed | predicted | error | GiB printed | allocated | error | in all | error | "
        "best plan t/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for point in points:
        paper, best = point["paper"], point["best"]
        start = f"| {point['id']} | {point['sp']} | {point['seq_len'] // K}K | {point['speed']:,.0f} |"
        if not paper["fits"]:
            lines.append(f"{start} does not fit ({paper['error']}) | | {point['memory_printed']} | | | | | |")
            continue
        lines.append(
            f"{start} {paper['speed']:,.0f} | {point['speed_error']:+.0%} | {point['memory_printed']} | "
            f"{paper['allocated']:.1f} | {point['allocated_error']:+.0%} | {paper['memory']:.1f} | "
            f"{point['memory_error']:+.0%} | {best['speed']:,.0f} |"
        )
    return [*lines, "", *_means_text(points)]


def _means_text(points: list[dict[str, Any]]) -> list[str]:
    """Mean errors, also under other guesses at what the figure leaves open: how much of the error that could be."""
    assumptions = [{"gpu": "h100", "gpus": VEOMNI_GPUS, "attention": "fa3"}]
    assumptions += [{k: o[k] for k in ("gpu", "gpus", "attention")} for o in points[0]["with_other_assumptions"]]
    lines = [
        "Mean errors with these assumptions, and with other guesses at what the figure leaves open. The guesses were",
        "made after seeing the errors of the first row: they show what could explain these errors, not that it does.",
        "The first row is the result. The cost model is the same in all rows.", "",
        "| GPU | GPUs | attention | points | t/s: mean error | mean absolute | allocated: mean error | mean absolute |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for i, assumed in enumerate(assumptions):
        rows = [p if i == 0 else p["with_other_assumptions"][i - 1] for p in points]
        rows = [row for row in rows if "speed_error" in row]
        if not rows:
            continue
        cells = []
        for key in ("speed_error", "allocated_error"):
            cells.append(f"{sum(row[key] for row in rows) / len(rows):+.0%}")
            cells.append(f"{sum(abs(row[key]) for row in rows) / len(rows):.0%}")
        lines.append(f"| {' | '.join(str(v) for v in assumed.values())} | {len(rows)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _environment() -> dict[str, str]:
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: version(name) for name in ("torch", "transformers")}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "commit": commit, "python": platform.python_version(), **versions}


if __name__ == "__main__":
    sys.exit(main())
