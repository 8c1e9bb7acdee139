"""What the convergence study writes: curves, scores, pictures, and what does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from convergence_runs import KEPT_PICTURES, Run, Score, Setup, differences

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES_EQUAL, FALLS_BELOW, TIMES_CHANCE, P, LEAST_STEPS = 1e-3, 0.5, 5.0, 1e-3, 200
STUDY, CONTROL = "float64", "float32"
_LABELS = {"text": "LM loss", "image": "decoder loss"}
_HEADER = ("model", "processes", "steps", "LM loss", "decoder loss", "largest difference", "task", "right",
           "by word", "x chance", "p")  # fmt: skip


def of_model(runs: Sequence[Run], model: str, dtype: str = STUDY) -> list[Run]:
    """Its runs in this dtype, by the number of processes."""
    found = [run for run in runs if run.model == model and run.setup.dtype == dtype]
    return sorted(found, key=lambda run: run.processes)


def largest_difference(first: Run, other: Run) -> float:
    """Between the curves of two runs of one model, over all steps and losses; not a number where a loss is none."""
    worst = 0.0
    for difference in differences(first, other):
        worst = difference if not difference <= worst else worst
        if worst != worst:
            break
    return worst


def steps_within(first: Run, other: Run, bound: float) -> int:
    """For how many steps from the first on the curves differ by no more than `bound`."""
    found = differences(first, other)
    return next((step for step, difference in enumerate(found) if not difference <= bound), len(found))


def failures(runs: Sequence[Run], models: Sequence[str]) -> list[str]:
    """What does not hold of these models."""
    return [line for model in models for line in _failures(model, of_model(runs, model))]


def _failures(model: str, runs: Sequence[Run]) -> list[str]:
    worlds = [run.processes for run in runs]
    if len(runs) < 2 or worlds[0] != 1:
        there = ", ".join(map(str, worlds)) or "no"
        return [f"{model}: runs in {STUDY} on {there} processes: one and several are asked for"]
    found = []
    for run in runs[1:]:
        if run.setup != runs[0].setup:
            found.append(f"{model}: runs on 1 and {run.processes} processes were trained differently")
        elif not (worst := largest_difference(runs[0], run)) <= CURVES_EQUAL:
            found.append(f"{model}: curves on 1 and {run.processes} processes differ by {worst:.1e}")
    for run in runs:
        where = f"{model} on {run.processes}"
        if len(run.curve) < LEAST_STEPS:
            found.append(f"{where}: {len(run.curve)} steps, fewer than {LEAST_STEPS}")
        for name in run.curve[0]:
            if not run.end(name) <= FALLS_BELOW * run.losses(name)[0]:
                found.append(
                    f"{where}: the {_LABELS[name]} ends at {run.end(name):.2f}, from {run.losses(name)[0]:.2f}"
                )
        found += [f"{where}: {line}" for score in run.scores if (line := _shortfall(score))]
        if not run.scores:
            found.append(f"{where}: not evaluated")
    return found


def _shortfall(score: Score) -> str:
    if score.times_chance >= TIMES_CHANCE and score.p < P:
        return ""
    return f"{score.task} is right {score.times_chance:.1f} times as often as chance (p {score.p:.0e})"


def write_report(runs: Sequence[Run], folder: Path, models: Sequence[str]) -> None:
    """convergence.md, and pictures of the curves and of what was drawn, in `folder`."""
    by_model = {model: found for model in models if (found := of_model(runs, model))}
    (folder / "convergence.md").write_text(report_text(runs, models))
    if by_model:
        _plot_curves(by_model, folder / "convergence.png")
        _plot_pictures(by_model, folder / "convergence_samples.png")


def report_text(runs: Sequence[Run], models: Sequence[str]) -> str:
    by_model = {model: found for model in models if (found := of_model(runs, model))}
    lines = ["# Convergence of the omni models at tiny size", "", *_intro(), ""]
    lines += [f"- {line}" for line in _setups(by_model)]
    lines += ["", *_rows(by_model), "", *_controls(runs, models)]
    missing = failures(runs, models)
    lines += ["What does not hold:" if missing else "Everything asked for holds.", *(f"- {f}" for f in missing), ""]
    return "\n".join(lines)


def _intro() -> list[str]:
    return [
        "`python benchmarks/convergence.py` on CPUs: the same micro-batches on one process, one after the other, and "
        "on several, under FSDP, with four of them under sequence parallelism of 2 too, and under expert parallelism "
        "of 2 where there are experts. LM loss and decoder loss: of the first step, and the mean of the last 20. "
        "Difference: of any loss at any step from that of one process. Right: of generated answers to prompts with "
        "pictures, videos and sounds that training did not draw, every answer asked for equally often, and how many "
        "times as often as by guessing; by word: how often the first and the second word of the answer are.",
        "",
        "All is computed in float64, norms, softmax and losses too, which transformers computes in float32: training "
        "enlarges any difference from step to step, that of rounding too, and in float64 it is 5e8 times smaller, "
        "so that the comparison tests the program. The same runs are compared and evaluated. All begin with the same "
        "weights: trained matrices are drawn with the deviation 1 / sqrt(inputs), embeddings with 0.5, because the "
        "0.02 of transformers is for widths of thousands; rotary angles have the base 100. A step has two "
        "micro-batches, one for each data rank, and now and then one of them has no picture to read or none to draw.",
    ]


def _setups(by_model: dict[str, list[Run]]) -> list[str]:
    found: dict[Setup, list[str]] = {}
    for model, runs in by_model.items():
        found.setdefault(runs[0].setup, []).append(model)
    return [f"{', '.join(models)}: {_setup_text(setup)}" for setup, models in found.items()]


def _setup_text(setup: Setup) -> str:
    return (
        f"{setup.steps} steps of AdamW, rate {setup.learning_rate:g} after {setup.warmup} steps of warm-up, then along "
        f"half a cosine to 0, epsilon {setup.epsilon:g}, no weight decay, gradients clipped to a norm of "
        f"{setup.largest_norm:g}, {setup.dtype}"
    )


def _rows(by_model: dict[str, list[Run]]) -> list[str]:
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for model, runs in by_model.items():
        for run in runs:
            losses = [f"{run.losses(n)[0]:.2f} to {run.end(n):.3f}" for n in _LABELS]
            off = f"{largest_difference(runs[0], run):.1e}" if run is not runs[0] else ""
            head = [model, str(run.processes), str(len(run.curve)), *losses, off]
            for score in run.scores:
                right = f"{score.right} of {score.asked}"
                words = ", ".join(map(str, score.words)) if len(score.words) > 1 else ""
                cells = [*head, score.task, right, words, f"{score.times_chance:.1f}", f"{score.p:.0e}"]
                lines.append("| " + " | ".join(cells) + " |")
                head = [""] * len(head)
    return lines


def _controls(runs: Sequence[Run], models: Sequence[str]) -> list[str]:
    """How long curves stay together with the rounding of float32."""
    lines = []
    for model in models:
        first, *others = of_model(runs, model, CONTROL) or [None]
        for other in others if first is not None else []:
            steps, count = len(differences(first, other)), steps_within(first, other, CURVES_EQUAL)
            worst = largest_difference(first, other)
            lines.append(
                f"In float32, the rest the same, the curves of {model} on {first.processes} and {other.processes} "
                f"processes stay within {CURVES_EQUAL:g} for the first {count} of {steps} steps; they differ by "
                f"{worst:.1e} at most."
            )
    return [line for text in lines for line in (text, "")]


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
    if not rows:
        return
    figure, axes = pyplot.subplots(
        len(rows), KEPT_PICTURES, figsize=(KEPT_PICTURES * 1.1, len(rows) * 1.5), squeeze=False
    )
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
