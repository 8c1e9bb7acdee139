"""What the convergence study writes: curves, scores, pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from convergence_evaluation import Drawn, Score

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES_EQUAL, FALLS_BELOW, TIMES_CHANCE, P = 1e-3, 0.5, 5.0, 1e-3
_TAIL = 20  # steps whose mean is the loss at the end
_LABELS = {"text": "LM loss", "image": "decoder loss"}
_SHOWN = 16


@dataclass(frozen=True)
class Run:
    """One training. curve: losses by step. seconds: of all of it."""

    model: str
    processes: int
    curve: Sequence[dict[str, float]]
    scores: Sequence[Score]
    pictures: Sequence[Drawn]
    seconds: float

    def losses(self, name: str) -> list[float]:
        return [losses[name] for losses in self.curve if name in losses]

    def end(self, name: str) -> float:
        tail = self.losses(name)[-_TAIL:]
        return sum(tail) / len(tail)


def largest_difference(runs: Sequence[Run]) -> float:
    """Between the curves of these runs of one model, over all steps and losses."""
    first, *others = runs
    pairs = ((a, b) for run in others for a, b in zip(first.curve, run.curve))
    return max((abs(a[name] - b[name]) for a, b in pairs for name in a), default=0.0)


def write_results(runs: Sequence[Run], folder: Path) -> list[str]:
    """Write everything, and return what does not hold."""
    folder.mkdir(parents=True, exist_ok=True)
    by_model: dict[str, list[Run]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    failures = [line for group in by_model.values() for line in _failures(group)]
    lines = ",\n".join(json.dumps(_json(run)) for run in runs)
    (folder / "convergence.json").write_text(f"[\n{lines}\n]\n")
    (folder / "convergence.md").write_text(_text(by_model, failures))
    _plot_curves(by_model, folder / "convergence.png")
    _plot_pictures(by_model, folder / "convergence_samples.png")
    return failures


def _failures(runs: Sequence[Run]) -> list[str]:
    found = []
    model = runs[0].model
    if (worst := largest_difference(runs)) > CURVES_EQUAL:
        found.append(f"{model}: curves differ by {worst:.1e}")
    for run in runs:
        where = f"{model} on {run.processes}"
        for name in run.curve[0]:
            if run.end(name) > FALLS_BELOW * run.losses(name)[0]:
                found.append(
                    f"{where}: the {_LABELS[name]} ends at {run.end(name):.2f}, from {run.losses(name)[0]:.2f}"
                )
        for score in run.scores:
            if score.times_chance < TIMES_CHANCE or score.p >= P:
                found.append(f"{where}: {score.task} is right {score.times_chance:.1f} times as often as chance")
    return found


def _json(run: Run) -> dict[str, object]:
    scores = [{"task": s.task, "right": s.right, "asked": s.asked, "chance": s.chance, "p": s.p} for s in run.scores]
    rounded = {name: [round(loss, 5) for loss in run.losses(name)] for name in run.curve[0]}
    return {"model": run.model, "processes": run.processes, "seconds": round(run.seconds), "scores": scores,
            "curves": rounded}  # fmt: skip


def _text(by_model: dict[str, list[Run]], failures: Sequence[str]) -> str:
    lines = [
        "# Convergence of the omni models at tiny size", "", "`python benchmarks/convergence.py` on CPUs. LM loss and "
        "decoder loss: of the first step, and the mean of the last 20. Right: of generated answers, and how many times "
        "as often as by guessing.", "",
        "| model | processes | steps | LM loss | decoder loss | largest difference | task | right | x chance | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model, runs in by_model.items():
        for run in runs:
            losses = [f"{run.losses(n)[0]:.2f} to {run.end(n):.3f}" for n in ("text", "image")]
            off = f"{largest_difference([runs[0], run]):.1e}" if run is not runs[0] else ""
            head = [model, str(run.processes), str(len(run.curve)), *losses, off]
            for score in run.scores:
                right = f"{score.right} of {score.asked}"
                lines.append(
                    "| " + " | ".join([*head, score.task, right, f"{score.times_chance:.1f}", f"{score.p:.0e}"]) + " |"
                )
                head = [""] * len(head)
    lines += [
        "",
        "What does not hold:" if failures else "Everything asked for holds.",
        *(f"- {f}" for f in failures),
        "",
    ]
    return "\n".join(lines)


def _plot_curves(by_model: dict[str, list[Run]], file: Path) -> None:
    figure, axes = pyplot.subplots(2, len(by_model), figsize=(4.2 * len(by_model), 5.6), squeeze=False, sharex=True)
    for column, (model, runs) in enumerate(by_model.items()):
        for row, name in enumerate(_LABELS):
            axis = axes[row][column]
            for number, run in enumerate(runs):
                style = {"linewidth": 2.4, "alpha": 0.5} if number == 0 else {"linewidth": 0.9, "linestyle": "--"}
                axis.plot(run.losses(name), label=f"{run.processes} process{'es' * (run.processes > 1)}", **style)
            axis.set_title(f"{model}: {_LABELS[name]}", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel("step")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _plot_pictures(by_model: dict[str, list[Run]], file: Path) -> None:
    rows = [run for runs in by_model.values() for run in runs if run.pictures]
    figure, axes = pyplot.subplots(len(rows), _SHOWN, figsize=(_SHOWN * 1.1, len(rows) * 1.5), squeeze=False)
    for run, line in zip(rows, axes):
        for drawn, axis in zip(run.pictures, line):
            axis.imshow(((drawn.picture.detach().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy())
            axis.set_title(drawn.name.replace(" ", "\n"), fontsize=7, color="black" if drawn.right else "red")
        line[0].set_ylabel(f"{run.model}\n{run.processes}", fontsize=7)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
