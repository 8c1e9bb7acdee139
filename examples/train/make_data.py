"""Make a data set for the tiny model beside this file.

    python examples/train/make_data.py data
    omnicompile train examples/train/recipe.yaml --data data/train.jsonl --out run

Samples are conversations with none to three images, coloured rectangles of many sizes, and an answer that names their
colours, so that there is something to learn. Lengths and sizes are drawn from log-normal distributions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_vl import COLORS, WORDS


def make_samples(folder: Path, name: str, count: int, seed: int) -> None:
    """`count` conversations in <name>.jsonl, their images in a folder beside it. The same for the same seed."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(_sample(folder, f"{name}-{number}", draw)) + "\n")


def _sample(folder: Path, name: str, draw: random.Random) -> dict[str, Any]:
    colors = [draw.choice(sorted(COLORS)) for _ in range(draw.choice((0, 0, 1, 1, 1, 2, 3)))]
    images = []
    for number, color in enumerate(colors):
        width, height = (min(40, max(8, round(draw.lognormvariate(3.0, 0.4)))) for _ in range(2))
        images.append(f"images/{name}-{number}.png")
        Image.new("RGB", (width, height), COLORS[color]).save(folder / images[-1])
    length = min(40, max(4, round(draw.lognormvariate(2.3, 0.6))))
    question = " ".join(draw.choice(WORDS) for _ in range(length))
    parts: list[dict[str, str]] = [{"type": "image"} for _ in colors] + [{"type": "text", "text": question}]
    answer = " ".join(colors) if colors else " ".join(reversed(question.split()[-4:]))
    return {"messages": [_turn("user", parts), _turn("assistant", answer)], "images": images}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--samples", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    make_samples(options.folder, "train", options.samples, options.seed)
    make_samples(options.folder, "eval", max(1, options.samples // 20), options.seed + 1)
    print(f"{options.samples} samples in {options.folder}/train.jsonl, others to evaluate on in eval.jsonl")


if __name__ == "__main__":
    main()
