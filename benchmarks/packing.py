"""How full packed micro-batches are, and what balancing does for the slowest rank.

The mix, drawn from a fixed seed: 30% of the samples are text alone; the others have an image, and each further one, up
to 4, with probability 0.4. Text: log-normal, median 330 tokens, sigma 0.9, cut to 16 to 4,000 tokens. Image sides are
log-normal, median 448 pixels, sigma 0.35, cut to 112 to 1,344 and rounded to multiples of 28; patches of 14 x 14
pixels, 4 of which become a token. The budget is what `suggest_budget` makes of 10,000 other samples of the mix.

Fill is real tokens and real patches as shares of the budgets of all packs, of which the last may be near empty; padding
never counts.

- best fit: the planner of the data loader, with its look-ahead buffer;
- greedy: in the order of the stream, a new pack where the next sample does not fit;
- one sample a row: every sample filled up to the budget.

Balancing: a step's time is bound by the slowest rank of every micro-step. The figure is the sum over micro-steps of
the largest value of any rank, over the mean of all ranks: 1 is best. Attention cost goes by squared lengths, weighted
as in a 7B model (28 layers of 3,584; encoder of 32 layers of 1,280), padding included. "floor" is what no assignment of
the step's samples could be below: the costliest single sample of a step over the mean.

    python benchmarks/packing.py [--samples 20000] [--seq-len 8192] [--out DIRECTORY]

Writes packing.md, prints it. Exit code 1 if best fit fills less than 97% of tokens or patches.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from omnicompile.data.balance import Weights, attention_cost, deal, deal_in_order, exchange
from omnicompile.data.budget import Budget, Size, suggest_budget
from omnicompile.data.packing import Item, Pack, fill, greedy
from omnicompile.data.planner import StepPlanner
from omnicompile.data.policy import Policy
from omnicompile.data.read import Read
from omnicompile.data.sources import Records
from omnicompile.data.stream import Stream

HERE = Path(__file__).resolve().parent
GOAL, PACKS, LOOK_AHEAD, MERGE = 0.97, 32, 256, 2
RANKS = (8, 16, 32)
WEIGHTS = Weights.of(28 * 3584, 32 * 1280)


def draw(rng: np.random.Generator) -> Size:
    images = 0 if rng.random() < 0.3 else min(int(rng.geometric(0.6)), 4)
    text = int(np.clip(rng.lognormal(np.log(330), 0.9), 16, 4000))
    patches = []
    for _ in range(images):
        height, width = (28 * round(float(np.clip(rng.lognormal(np.log(448), 0.35), 112, 1344)) / 28) for _ in range(2))
        patches.append(height // 14 * (width // 14))
    return Size(text + sum(patches) // MERGE**2, tuple(patches))


class Known:
    """Sizes that are known already, in the place of samples that are read."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self._reads = deque(Read(sizes=(size,)) for size in sizes)

    def next(self) -> Read:
        return self._reads.popleft()


def packed(sizes: Sequence[Size], budget: Budget, look_ahead: int) -> tuple[list[list[Pack]], float]:
    """Steps of up to `PACKS` packs, and CPU seconds a step."""
    source = Records([{}] * len(sizes))
    stream, known = Stream(len(sizes), 0, False, 1), Known(sizes)
    planner = StepPlanner(
        stream, source, known, budget, PACKS, look_ahead, Policy.REFUSE, Policy.REFUSE, "mix"
    )  # type: ignore[arg-type]  # fmt: skip
    steps, start = [], time.process_time()
    while planner.position < len(sizes):
        steps.append(planner.next())
    return steps, (time.process_time() - start) / len(steps)


def joined(steps: Sequence[Sequence[Pack]]) -> list[Pack]:
    return [pack for step in steps for pack in step]


def fill_table(sizes: Sequence[Size], budget: Budget) -> tuple[list[str], bool]:
    items = [Item((0, number, 0), size) for number, size in enumerate(sizes)]
    rows = ["| | look-ahead | tokens | patches | packs | CPU seconds a step |", "|---|---|---|---|---|---|"]
    reached = False
    for look_ahead in (64, 128, LOOK_AHEAD, 512):
        steps, seconds = packed(sizes, budget, look_ahead)
        packs = joined(steps)
        share = fill(packs, budget)
        if look_ahead == LOOK_AHEAD:
            reached = min(share["tokens"], share["patches"]) >= GOAL
        rows.append(_row("best fit", str(look_ahead), share, len(packs), f"{seconds:.3f}"))
    packs = greedy(items, budget)
    rows.append(_row("greedy", "", fill(packs, budget), len(packs), ""))
    rows.append(_row("one sample a row", "", fill([[item] for item in items], budget), len(items), ""))
    return rows, reached


def _row(name: str, look_ahead: str, share: dict[str, float], packs: int, seconds: str) -> str:
    return f"| {name} | {look_ahead} | {share['tokens']:.1%} | {share['patches']:.1%} | {packs:,} | {seconds} |"


def off_table(sizes: Sequence[Size], budget: Budget) -> list[str]:
    rows = ["| patches of the budget | tokens | patches |", "|---|---|---|"]
    for factor in (0.8, 0.9, 1.0, 1.1, 1.2):
        patches = round(budget.patches * factor / MERGE**2) * MERGE**2
        steps, _ = packed(sizes, Budget(budget.tokens, patches, segments=budget.segments, merge=MERGE), LOOK_AHEAD)
        other = Budget(budget.tokens, patches, segments=budget.segments, merge=MERGE)
        share = fill(joined(steps), other)
        rows.append(f"| {patches:,} ({factor:.0%}) | {share['tokens']:.1%} | {share['patches']:.1%} |")
    return rows


def slowest(dealt: Sequence[Sequence[Pack]], value: Callable[[Pack], int]) -> tuple[int, float]:
    """(sum over micro-steps of the largest of any rank, the mean of all ranks)."""
    micro_steps = range(len(dealt[0]))
    worst = sum(max(value(mine[micro]) for mine in dealt) for micro in micro_steps)
    return worst, sum(value(pack) for mine in dealt for pack in mine) / len(dealt)


def balance_table(steps: Sequence[Sequence[Pack]], budget: Budget) -> list[str]:
    values: dict[str, Callable[[Pack], int]] = {
        "attention": lambda pack: attention_cost(pack, WEIGHTS, budget),
        "patches": lambda pack: sum(item.size.patches for item in pack),
    }
    start = time.process_time()
    evened = [exchange(step, WEIGHTS, budget) for step in steps]
    seconds = (time.process_time() - start) / len(steps)
    rows = [
        "| ranks x micro-steps | | as packed | packs dealt out | samples exchanged too | floor |",
        "|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        for name, value in values.items():
            shares = []
            for made in (
                [deal_in_order(step, ranks) for step in steps],
                [deal(step, ranks, WEIGHTS, budget) for step in steps],
                [deal(step, ranks, WEIGHTS, budget) for step in evened],
            ):
                found = [slowest(dealt, value) for dealt in made]
                shares.append(sum(worst for worst, _ in found) / sum(mean for _, mean in found))
            text = " | ".join(f"{share:.3f}" for share in shares)
            rows.append(f"| {ranks} x {PACKS // ranks} | {name} | {text} | {floor(steps, budget, ranks, name)} |")
    return [*rows, "", f"Exchanging takes {seconds:.2f} CPU seconds a step of {PACKS} packs."]


def floor(steps: Sequence[Sequence[Pack]], budget: Budget, ranks: int, name: str) -> str:
    """For one micro-step only, where the costliest sample bounds the costliest pack."""
    if name != "attention" or ranks != PACKS:
        return ""
    worst = mean = 0.0
    for step in steps:
        average = sum(attention_cost(pack, WEIGHTS, budget) for pack in step) / len(step)
        worst += max(average, max(WEIGHTS.cost(item.size) for pack in step for item in pack))
        mean += average
    return f"{worst / mean:.3f}"


def report(samples: int, seq_len: int) -> tuple[str, bool]:
    rng = np.random.default_rng(0)
    budget = suggest_budget([draw(rng) for _ in range(10_000)], seq_len, merge=MERGE)
    sizes = [draw(rng) for _ in range(samples)]
    table, reached = fill_table(sizes, budget)
    steps = [step for step in packed(sizes, budget, LOOK_AHEAD)[0] if len(step) == PACKS]
    tokens, patches = (float(np.mean([getattr(s, name) for s in sizes])) for name in ("tokens", "patches"))
    lines = [
        "# Packing and balancing",
        "",
        "Printed by `python benchmarks/packing.py`, which says what is measured how.",
        "",
        f"- mix: {samples:,} samples, {tokens:,.0f} tokens and {patches:,.0f} patches each on average, the longest "
        f"{max(s.tokens for s in sizes):,} tokens",
        f"- budget: {budget.tokens:,} tokens, {budget.patches:,} patches, {budget.segments} segments, by "
        "`suggest_budget`",
        f"- steps of {PACKS} packs",
        "",
        "## Fill",
        "",
        *table,
        "",
        f"Goal: {GOAL:.0%} of both at a look-ahead of {LOOK_AHEAD}: {'reached' if reached else 'missed'}.",
        "",
        "With budgets that do not go with the mix:",
        "",
        *off_table(sizes, budget),
        "",
        "## Slowest rank",
        "",
        *balance_table(steps, budget),
        "",
    ]
    return "\n".join(lines), reached


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=20_000)
    arguments.add_argument("--seq-len", type=int, default=8192)
    arguments.add_argument("--out", type=Path, default=HERE / "results")
    options = arguments.parse_args()
    text, reached = report(options.samples, options.seq_len)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "packing.md").write_text(text)
    print(text)
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
