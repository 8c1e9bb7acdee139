"""Plans every recipe of the zoo anew: `python -m omnicompile.recipes.generate [NAME ...] [--check]`.

Planning needs no GPU. A model is traced once for all its recipes; all of them take a few minutes. `--check` writes
nothing and exits with 1 if a committed recipe differs from what the planner says now.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from omnicompile.capture.source import load_model_source
from omnicompile.cluster import Cluster
from omnicompile.errors import InputError, OmniCompileError
from omnicompile.plan import Plan
from omnicompile.planner.api import plan_source
from omnicompile.recipe import dumps, load_recipe
from omnicompile.recipes import DIRECTORY
from omnicompile.schema import Place, decode, encode, mapping, suggestion
from omnicompile.whole_file import write_whole
from omnicompile.workload import Workload

SETTINGS = DIRECTORY / "models" / "models.yaml"
COMMAND = "python -m omnicompile.recipes.generate"
TOKENS_PER_STEP = 2**24
"""At most so many tokens make an optimizer step: larger batches than those of published trainings help no one."""
CLOSE = 1e-6
"""Relative difference of two predictions that are the same: machines differ in the last digits of a float."""


@dataclass(frozen=True)
class Line:
    """A line of models.yaml. gpus: sample lengths in K tokens by number of GPUs."""

    name: str
    model: str
    gpus: dict[int, tuple[int, ...]]
    gpu: str = "h100"
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What one recipe is planned for. model: as `omnicompile plan` takes it."""

    name: str
    model: str
    cluster: Cluster
    workload: Workload

    @property
    def path(self) -> Path:
        return DIRECTORY / f"{self.name}.yaml"


def settings(path: Path = SETTINGS) -> list[Setting]:
    """Every recipe that models.yaml asks for."""
    found: dict[str, Setting] = {}
    for line in _lines(path):
        spec = line.model if ":" in line.model else f"omnicompile.recipes.models.{line.model}:build"
        for gpus, lengths in line.gpus.items():
            for length in lengths:
                setting = _setting(line, spec, gpus, length)
                if setting.name in found:
                    raise InputError(f"{path}: {setting.name} is asked for twice")
                found[setting.name] = setting
    return list(found.values())


def planned(setting: Setting) -> Plan:
    """The planner's best plan. Raises what planning raises: InfeasibleError where nothing fits."""
    return plan_source(load_model_source(setting.model), setting.cluster, setting.workload).plans[0]


def text_of(plan: Plan) -> str:
    """The recipe file."""
    return f"# Planned by `{COMMAND}`; what it is for stands in models/models.yaml.\n{dumps(plan)}"


def differences(committed: Plan, fresh: Plan) -> list[str]:
    """What of a committed recipe the planner would say otherwise now; [] if nothing."""
    before, now = _flat(encode(committed)), _flat(encode(fresh))
    return [
        f"{name}: {before.get(name)} is now {now.get(name)}"
        for name in before | now
        if not _same(before.get(name), now.get(name))
    ]


def stale(setting: Setting) -> list[str]:
    """What is wrong with the committed recipe of `setting`, planned anew; [] if nothing."""
    if not setting.path.is_file():
        return ["there is no such recipe yet"]
    return differences(load_recipe(setting.path), planned(setting))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested plain data under dotted names."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=CLOSE)
    return bool(old == new)


def _lines(path: Path) -> list[Line]:
    place = Place(str(path))
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, list):
        raise place.error("must be a list of models")
    return [_line(entry, place.key(str(index))) for index, entry in enumerate(data)]


def _line(entry: Any, place: Place) -> Line:
    given = mapping(entry, place).get("gpus")
    if not isinstance(given, dict) or not all(isinstance(count, int) for count in given):
        raise place.error("must have `gpus`: sample lengths by number of GPUs")
    lengths = {count: decode(tuple[int, ...], item, place.key("gpus")) for count, item in given.items()}
    return replace(decode(Line, entry | {"gpus": {}}, place), gpus=lengths)


def _setting(line: Line, spec: str, gpus: int, length: int) -> Setting:
    seq_len = length * 1024
    most = 2 ** int(math.log2(max(1, TOKENS_PER_STEP // seq_len)))
    workload = Workload(seq_len=seq_len, global_batch=most if most < gpus else None, freeze=line.freeze)
    return Setting(f"{line.name}-{gpus}x{line.gpu}-{length}k", spec, Cluster(gpus, line.gpu), workload)


def _chosen(names: Iterable[str]) -> list[Setting]:
    known = {setting.name: setting for setting in settings()}
    for name in names:
        if name not in known:
            raise InputError(f"{SETTINGS.name} has no recipe {name!r}{suggestion(name, known)}")
    return [known[name] for name in names] or list(known.values())


def _leftover() -> list[Path]:
    """Recipes that nothing asks for any more."""
    wanted = {setting.path for setting in settings()}
    return [path for path in sorted(DIRECTORY.glob("*.yaml")) if path not in wanted]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these recipes")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a recipe is not up to date")
    args = parser.parse_args(argv)
    try:
        failed = [setting.name for setting in _chosen(args.names) if not _done(setting, args.check)]
    except OmniCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in _leftover():
        print(f"{path.stem}: not in {SETTINGS.name} any more; delete {path}")
        failed.append(path.stem)
    return 1 if failed else 0


def _done(setting: Setting, check: bool) -> bool:
    """Whether the recipe is up to date, or has been written."""
    try:
        found = stale(setting) if check else _write(setting)
    except OmniCompileError as error:
        found = [str(error)]
    print(f"{setting.name}: {'; '.join(found) or ('up to date' if check else 'written')}", flush=True)
    return not found


def _write(setting: Setting) -> list[str]:
    write_whole(setting.path, text_of(planned(setting)))
    return []


if __name__ == "__main__":
    sys.exit(main())
