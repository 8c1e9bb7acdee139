"""Recipes: a Plan as a YAML file that a person can read, edit and diff.

A whole recipe loads back as an equal Plan. A part of one (some fields of `mesh`, `blocks` and `step`) is a list of
pins: choices that the planner keeps while it fills in the rest. Unknown keys are errors everywhere. A section `train`
holds options of `omnicompile train`, which reads and checks it; a Plan does not have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from omnicompile.cluster import Cluster
from omnicompile.errors import InputError, RecipeError
from omnicompile.plan import OURS, BlockPlan, LossHead, Mesh, Overlap, Plan, Prediction, Stack
from omnicompile.schema import Place, check_keys, decode, encode, field_types, mapping, suggestion
from omnicompile.whole_file import write_whole
from omnicompile.workload import Workload

VERSION_KEY = "omnicompile_recipe"
VERSION = 1
SECTIONS = (
    VERSION_KEY, "model", "cluster", "workload", "mesh", "blocks", "step", "stack", "overlap", "prediction", "notes",
    "train",
)  # fmt: skip
STEP_FIELDS: dict[str, Any] = {
    "micro_batch": int,
    "accumulation": int,
    "loss_head": LossHead,
    "offload_optimizer": bool,
    "param_dtype": str,
    "reduce_dtype": str,
}
_SHARED: dict[str, dict[str, Any]] = {
    "mesh": field_types(Mesh), "step": STEP_FIELDS, "stack": field_types(Stack), "overlap": field_types(Overlap),
}  # fmt: skip
"""Choices by section, those of blocks apart."""
COMMENTS = {
    "mesh": "ranks = dp_replicate x dp_shard x sp x tp x cp x pp; ep is folded out of dp_shard x sp",
    "blocks": "one line per modality block",
    "stack": "another software stack's ways, priced and not executable",
    "overlap": "what makes communication run beside compute",
    "prediction": "by the cost model: seconds, bytes per GPU",
}


def save_recipe(plan: Plan, path: str | Path) -> None:
    """Write `plan` to `path`, whole or not at all."""
    try:
        write_whole(path, dumps(plan))
    except OSError as error:
        raise RecipeError(f"cannot write the recipe to {path}: {error.strerror}") from error


def load_recipe(path: str | Path) -> Plan:
    """The Plan that a recipe file holds; raises RecipeError naming the file, line and key of what is wrong."""
    return loads(_read(path), str(path))


def dumps(plan: Plan) -> str:
    """`plan` as YAML text: short sections as one line each, so that two recipes diff line by line."""
    lines = [f"{VERSION_KEY}: {VERSION}", *_block({"model": plan.model})]
    lines += ["cluster: " + _flow(encode(plan.cluster))]
    lines += ["workload: " + _flow(encode(plan.workload))]
    lines += [f"# {COMMENTS['mesh']}", "mesh: " + _flow(encode(plan.mesh))]
    lines += [f"# {COMMENTS['blocks']}", "blocks:" if plan.blocks else "blocks: {}"]
    lines += [f"  {_flow(name)}: {_flow(encode(block))}" for name, block in plan.blocks.items()]
    lines += _block({"step": {name: encode(getattr(plan, name)) for name in STEP_FIELDS}})
    if plan.stack != OURS:
        lines += [f"# {COMMENTS['stack']}", "stack: " + _flow(_changed(plan.stack))]
    if plan.overlap != Overlap():
        lines += [f"# {COMMENTS['overlap']}", "overlap: " + _flow(_changed(plan.overlap))]
    if plan.prediction is not None:
        lines += [f"# {COMMENTS['prediction']}", *_block({"prediction": encode(plan.prediction)})]
    if plan.notes:
        lines += _block({"notes": list(plan.notes)})
    return "\n".join(lines) + "\n"


def loads(text: str, name: str = "recipe") -> Plan:
    """The Plan that `text` holds; `name` is the file to name in errors."""
    data, place = _parse(text, name)
    for section in ("model", "cluster", "workload", "mesh", "blocks", "step"):
        if section not in data:
            raise place.error(
                f"section {section!r} is missing: not a whole recipe (to plan with a part of one as pins: "
                f"omnicompile plan MODEL --recipe {name})"
            )
    step = mapping(data["step"], place.key("step"))
    check_keys(step, STEP_FIELDS, place.key("step"))
    prediction = data.get("prediction")
    plan = Plan(
        model=decode(str, data["model"], place.key("model")),
        cluster=_checked(Cluster, data["cluster"], place.key("cluster")),
        workload=_checked(Workload, data["workload"], place.key("workload")),
        mesh=decode(Mesh, data["mesh"], place.key("mesh")),
        blocks=decode(dict[str, BlockPlan], data["blocks"], place.key("blocks")),
        prediction=None if prediction is None else decode(Prediction, prediction, place.key("prediction")),
        notes=decode(tuple[str, ...], data.get("notes") or [], place.key("notes")),
        stack=decode(Stack, data.get("stack") or {}, place.key("stack")),
        overlap=decode(Overlap, data.get("overlap") or {}, place.key("overlap")),
        **{key: decode(STEP_FIELDS[key], item, place.key("step").key(key)) for key, item in step.items()},
    )
    _check_consistent(plan, place)
    return plan


def load_pins(path: str | Path) -> dict[str, str]:
    """The choices that a recipe, or any part of one, fixes: {"mesh.sp": "4", "vision.layout": "images", ...}."""
    data, place = _parse(_read(path), str(path))
    pins: dict[str, str] = {}
    for section, kinds in _SHARED.items():
        pins |= _section_pins(section, data.get(section), kinds, place.key(section))
    for block, choices in mapping(data.get("blocks") or {}, place.key("blocks")).items():
        pins |= _section_pins(block, choices, field_types(BlockPlan), place.key("blocks").key(block))
    return pins


def load_machine(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `cluster` and `workload` fields that a recipe, or any part of one, gives (those not given are absent)."""
    data, place = _parse(_read(path), str(path))
    return tuple(  # type: ignore[return-value]
        _section_fields(data.get(section), field_types(kind), place.key(section))
        for section, kind in (("cluster", Cluster), ("workload", Workload))
    )


def check_pins(pins: Mapping[str, str]) -> dict[str, str]:
    """Pins with their field names and values checked; "sp" means "mesh.sp", "micro_batch" means "step.micro_batch"."""
    checked: dict[str, str] = {}
    for key, text in pins.items():
        place = Place(f"--pin {key}={text}")
        section, _, name = key.rpartition(".")
        section = section or _owner(name)
        kinds = _pin_fields(section)
        if name not in kinds:
            raise InputError(str(place.error(f"{section} has no choice {name!r}{suggestion(name, kinds)}")))
        try:
            value = decode(kinds[name], yaml.safe_load(text), place)
        except (RecipeError, yaml.YAMLError) as error:
            raise InputError(str(error)) from error
        checked[f"{section}.{name}"] = pin_text(value)
    return checked


def parse_pins(items: list[str]) -> dict[str, str]:
    """Pins as typed on the command line: ["vision.sp=1", ...]."""
    pins: dict[str, str] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip() or not text.strip():
            raise InputError(f"--pin {item}: write it as block.choice=value, such as --pin vision.sp=1")
        pins[key.strip()] = text.strip()
    return check_pins(pins)


def split_choices(text: str, option: str) -> dict[str, str]:
    """ "sp=4, text.recompute=full" as {"sp": "4", "text.recompute": "full"}. option: what the text was given as."""
    choices: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise InputError(f"{option}: {item!r} is not choice=value, such as sp=4 or text.recompute=full")
        choices[key] = value
    return choices


def pin_text(value: Any) -> str:
    """A choice as the text of a pin: 4, true, fsdp."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _owner(name: str) -> str:
    """The section of a choice that was named without one."""
    return next((section for section, kinds in _SHARED.items() if name in kinds), "mesh")


def _pin_fields(section: str) -> dict[str, Any]:
    return _SHARED.get(section) or field_types(BlockPlan)


def _changed(section: Stack | Overlap) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {f.name: encode(getattr(section, f.name)) for f in fields(section) if getattr(section, f.name) != f.default}


def _section_fields(value: Any, kinds: dict[str, Any], place: Place) -> dict[str, Any]:
    data = mapping(value or {}, place)
    check_keys(data, kinds, place)
    return {key: decode(kinds[key], item, place.key(key)) for key, item in data.items()}


def _section_pins(section: str, value: Any, kinds: dict[str, Any], place: Place) -> dict[str, str]:
    """Every whole number among these choices counts something."""
    choices = _section_fields(value, kinds, place)
    for key, item in choices.items():
        if type(item) is int and item < 1:
            raise place.key(key).error(f"must be at least 1, got {item}")
    return {f"{section}.{key}": pin_text(item) for key, item in choices.items()}


def _checked(kind: type, value: Any, place: Place) -> Any:
    try:
        return decode(kind, value, place)
    except InputError as error:
        raise place.error(str(error)) from error


def _check_consistent(plan: Plan, place: Place) -> None:
    for f in fields(plan.mesh):
        if getattr(plan.mesh, f.name) < 1:
            raise place.key("mesh").key(f.name).error(f"must be at least 1, got {getattr(plan.mesh, f.name)}")
    if plan.mesh.world != plan.cluster.gpus:
        raise place.key("mesh").error(
            f"degrees multiply to {plan.mesh.world} ranks, but the cluster has {plan.cluster.gpus} GPUs"
        )
    _check_stack(plan.stack, place.key("stack"))
    for name in ("head_groups", "expert_chunks", "prefetch"):
        if getattr(plan.overlap, name) < 1:
            raise place.key("overlap").key(name).error(f"must be at least 1, got {getattr(plan.overlap, name)}")
    for name in ("micro_batch", "accumulation"):
        if getattr(plan, name) < 1:
            raise place.key("step").key(name).error(f"must be at least 1, got {getattr(plan, name)}")


def _check_stack(stack: Stack, place: Place) -> None:
    for name, value in (("pipeline_chunks", stack.pipeline_chunks), ("expert_tp", stack.expert_tp)):
        if value < 1:
            raise place.key(name).error(f"must be at least 1, got {value}")
    if not 0 <= stack.recompute_share <= 1:
        raise place.key("recompute_share").error(f"must be between 0 and 1, got {stack.recompute_share}")


def read_yaml(path: str | Path, what: str) -> tuple[dict[str, Any], Place]:
    """The mapping that a YAML file holds, and where its keys stand. what: the file is expected to be.

    Raises RecipeError where the file cannot be read, is malformed or empty, or has a key twice.
    """
    return _parse_yaml(_read(path, what), str(path), what)


def _read(path: str | Path, what: str = "recipe") -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{what} {path} does not exist") from error
    except OSError as error:
        raise RecipeError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a {what}: not UTF-8 text") from error


def _parse(text: str, name: str) -> tuple[dict[str, Any], Place]:
    """The top level of a recipe with its keys and version checked."""
    data, place = _parse_yaml(text, name, "recipe")
    check_keys(data, SECTIONS, place)
    _check_version(data, place)
    return data, place


def _parse_yaml(text: str, name: str, what: str) -> tuple[dict[str, Any], Place]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[tuple[str, ...], int] = {}
        data = None if root is None else _plain(root, (), lines, name)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise RecipeError(f"{name}{line}: malformed YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: malformed YAML: {str(error).splitlines()[0]}") from error
    place = Place(name, (), lines)
    if data is None:
        raise place.error(f"the {what} is empty")
    return mapping(data, place), place


def _check_version(data: dict[str, Any], place: Place) -> None:
    if VERSION_KEY not in data:
        raise place.error(f"not a recipe: the line '{VERSION_KEY}: {VERSION}' is missing")
    version = data[VERSION_KEY]
    if version != VERSION or isinstance(version, bool):
        raise place.key(VERSION_KEY).error(
            f"schema version {version!r}, and this OmniCompile reads version {VERSION}: "
            "plan again, or use the version of OmniCompile that wrote it"
        )


def _plain(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str) -> Any:
    """A YAML node as plain data; notes the line of every key and refuses a key given twice."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, lines, name) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    data: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _plain(key_node, path, lines, name)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str) and not isinstance(key, (int, float, bool)) and key is not None:
            raise RecipeError(f"{name}:{line}: a key must be text")
        if key in data:
            raise RecipeError(f"{name}:{line}: key {key!r} is given twice")
        lines[(*path, str(key))] = line
        data[key] = _plain(value_node, (*path, str(key)), lines, name)
    return data


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    finally:
        loader.dispose()


class _Dumper(yaml.SafeDumper):
    """Repeated values are written out, not as anchors and aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with line breaks in double quotes, where they are escaped: other styles fold some of them away."""
    style = '"' if any(char in text for char in "\r\n\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _flow(value: Any) -> str:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _block(value: Any) -> list[str]:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").split("\n")
