"""Collects the keys that a target's own classes define, from a checkout of it, into `omnicompile/export/keys/`:

    python tests/export/collect_keys.py veomni CHECKOUT "commit d9774494, 2026-08-21"

Only names, annotations and choices are read (by `ast`; nothing of the checkout is imported). Run it again for a newer
version, then mend the rules that `pytest tests/export` names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

KEYS = Path(__file__).parents[2] / "omnicompile" / "export" / "keys"
Classes = dict[str, ast.ClassDef]


def veomni(root: Path) -> dict[str, str]:
    """Nested dataclasses, by dotted path."""
    classes = _classes(root / "veomni/arguments/arguments_types.py") | _classes(root / "veomni/trainer/vlm_trainer.py")
    return dict(_flattened(classes, "VeOmniVLMArguments", ""))


def torchtitan(root: Path) -> dict[str, str]:
    """The shared sections, and those that a component's own class `Config` describes."""
    classes = _classes(root / "torchtitan/config/configs.py")
    sections = {"training": "TrainingConfig", "parallelism": "ParallelismConfig", "debug": "DebugConfig"}
    found = {key: kind for section, name in sections.items() for key, kind in _flattened(classes, name, f"{section}.")}
    components = {
        "lr_scheduler": ("optimizer/lr_scheduler.py", "LRSchedulersContainer"),
        "checkpoint": ("checkpointer/base.py", "BaseCheckpointManager"),
        "validator": ("validate.py", "Validator"),
        "metrics": ("metrics.py", "MetricsProcessor"),
    }
    for section, (file, owner) in components.items():
        found |= {f"{section}.{key}": kind for key, kind in _own_config(root / "torchtitan/components" / file, owner)}
    return found


def megatron(root: Path) -> dict[str, str]:
    """Flags of the parser, and those that it makes of configuration classes."""
    parser = root / "megatron/training/arguments.py"
    found: dict[str, str] = {}
    for folder in ("megatron/training/config", "megatron/core"):
        for file in sorted((root / folder).rglob("*config.py")):
            for name, node in _classes(file).items():
                if name in _factories(parser) or name == "ModelParallelConfig":
                    found |= {_flag(field): kind for field, kind in _fields(node)}
    return found | dict(_added(parser))


def _factories(parser: Path) -> set[str]:
    """Names of the classes that become groups of arguments."""
    calls = (node for node in ast.walk(ast.parse(parser.read_text())) if isinstance(node, ast.Call))
    return {
        call.args[0].id
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "ArgumentGroupFactory"
        and isinstance(call.args[0], ast.Name)
    }


def _added(parser: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(parser.read_text())):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        ):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
        kind = options.get("type", "str")
        if options.get("action", "").startswith("'store_"):
            kind = "bool"
        if options.get("choices", "").startswith("["):
            kind = f"Literal{options['choices']}"
        for name in node.args:
            if isinstance(name, ast.Constant):
                yield str(name.value), f"List[{kind}]" if "nargs" in options else kind


def _classes(file: Path) -> Classes:
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}


def _own_config(file: Path, owner: str) -> Iterator[tuple[str, str]]:
    """Fields of the class `Config` inside `owner`, after those of the classes that `owner` inherits from."""
    classes = _classes(file)
    for base in classes[owner].bases:
        if ast.unparse(base) in classes:
            yield from _own_config(file, ast.unparse(base))
    inner = (node for node in classes[owner].body if isinstance(node, ast.ClassDef) and node.name == "Config")
    for node in inner:
        yield from _fields(node)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, ast.unparse(item.annotation).strip("'")


def _flattened(classes: Classes, name: str, prefix: str) -> Iterator[tuple[str, str]]:
    fields: dict[str, str] = {}
    for base in (ast.unparse(base) for base in classes[name].bases):
        fields |= dict(_fields(classes[base])) if base in classes else {}
    for field, kind in (fields | dict(_fields(classes[name]))).items():
        if kind in classes:
            yield from _flattened(classes, kind, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}", kind


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


COLLECT: dict[str, Callable[[Path], dict[str, str]]] = {
    "veomni": veomni,
    "torchtitan": torchtitan,
    "megatron": megatron,
}


def main(target: str, checkout: str, version: str) -> None:
    found = COLLECT[target](Path(checkout))
    text = f"# Written by tests/export/collect_keys.py.\nversion: {version}\n"
    text += yaml.safe_dump({"keys": dict(sorted(found.items()))}, sort_keys=False, width=10**9)
    (KEYS / f"{target}.yaml").write_text(text)
    print(f"{len(found)} keys of {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
