"""Arguments that several commands share, and what they mean: model, cluster, workload."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from omnicompile.cluster import Cluster
from omnicompile.errors import InputError
from omnicompile.workload import Workload

MODEL_HELP = (
    "a python file with build() (or file.py:function), a config.json or a directory that holds one, "
    "or package.module:Class with --config"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--config", metavar="FILE", help="the config.json of a model named as package.module:Class")
    parser.add_argument("--no-cache", action="store_true", help="trace the model again, even if it was traced before")


def add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs in all (required, unless a recipe says so)")
    group.add_argument("--gpu", metavar="NAME", help="h100 (default), h200, a100, b200, ... or a hardware YAML file")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs in a node (default 8)")
    group.add_argument("--price", type=float, metavar="X", help="price of a GPU-hour, for the cost lines of the report")


def add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload (one training sample)")
    group.add_argument("--seq-len", type=int, metavar="N", help="tokens, those of images and audio included (8192)")
    group.add_argument("--images", type=int, metavar="N", help="images (2 where the model takes any)")
    group.add_argument("--image-size", type=image_size, metavar="HxW", help="height x width of an image (896x896)")
    group.add_argument("--audio-seconds", type=float, metavar="X", help="audio (30 where the model takes any)")
    group.add_argument("--global-batch", type=int, metavar="N", help="samples per optimizer step (one per GPU)")
    group.add_argument("--freeze", type=names, metavar="BLOCKS", help="blocks not trained: vision,audio or encoders")


def cluster_of(args: argparse.Namespace, recipe: dict[str, Any], gpus: int | None = None) -> Cluster:
    """The cluster of the recipe's fields, overridden by those given on the command line."""
    given = {
        "gpus": args.gpus if args.gpus is not None else gpus,
        "gpu": args.gpu,
        "gpus_per_node": args.gpus_per_node,
        "price_per_gpu_hour": args.price,
    }
    values = recipe | {key: value for key, value in given.items() if value is not None}
    if "gpus" not in values:
        raise InputError("--gpus is needed: how many GPUs to plan for, such as --gpus 128")
    if values.get("price_per_gpu_hour") is not None and values["price_per_gpu_hour"] < 0:
        raise InputError(f"--price must not be negative, got {values['price_per_gpu_hour']:g}")
    return Cluster(**values)


def workload_of(args: argparse.Namespace, base: Workload | None, recipe: dict[str, Any]) -> Workload:
    """The workload of the model's file, overridden by the recipe's fields, then by the command line."""
    start = {} if base is None else {f.name: getattr(base, f.name) for f in fields(base)}
    given = {f.name: getattr(args, f.name) for f in fields(Workload)}
    return Workload(**(start | recipe | {key: value for key, value in given.items() if value is not None}))


def image_size(text: str) -> tuple[int, int]:
    """'448x896' as (height, width); one number means a square."""
    parts = text.lower().split("x")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 896x896")
    return sides[0], sides[1]


def names(text: str) -> tuple[str, ...]:
    """'vision,audio' as a tuple."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, such as vision,audio")
    return parts
