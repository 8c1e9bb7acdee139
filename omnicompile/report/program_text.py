"""A rank's program as readable Python: one statement a node, with shapes, placements and added collectives in comments.

Layers that repeat are printed once; the others of a kind are named in one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnicompile.passes.rank_program import GROUP_PREFIX, ParamSpec, RankProgram
from omnicompile.torch_compat import OpOverload

_COMMENT_COLUMN = 84
_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool", torch.uint8: "u8",
}  # fmt: skip
_LAYER = re.compile(r"^(.*?)\.(\d+)(?=\.|$)")
_NAME = re.compile(r"(?<![\w.])[a-z_]\w*\b(?![(.])")  # of a variable, not of an operator
_FEWEST_FOLDED = 3  # statements; shorter runs are printed as they are


@dataclass
class _Run:
    """Statements in a row that come from one layer (path "" outside layers)."""

    path: str
    lines: list[str]

    def canonical(self) -> str:
        """The text with names by order of appearance, so that equal layers read equal."""
        numbers: dict[str, str] = {}
        text = "\n".join(self.lines).replace(self.path, "*") if self.path else "\n".join(self.lines)
        text = re.sub(
            r"(?<![\w.])[a-z_]\w*\b(?![(.])", lambda m: numbers.setdefault(m.group(), f"v{len(numbers)}"), text
        )
        return re.sub(r"[ \t]+", " ", text.replace("#", " #"))


def program_text(program: RankProgram, full: bool = False) -> str:
    """The program as the body of `forward`. full: print every layer."""
    nodes = list(program.gm.graph.nodes)
    lines = [f"# mesh {program.mesh.dp_replicate} x {program.mesh.dp_shard} x {program.mesh.sp}, ep {program.mesh.ep}"]
    lines += [f"# block {name}: {b.sharding}, {b.layout}, sp {b.sp}, ep {b.ep}" for name, b in program.blocks.items()]
    lines.append("def forward(")
    lines += _folded(_runs([n for n in nodes if n.op == "placeholder"], program), full)
    lines.append("):")
    lines += _folded(_runs([n for n in nodes if n.op not in ("placeholder", "output")], program), full)
    outputs = ", ".join(n.name for n in program.output_nodes())
    placed = ", ".join(str(p) for p in program.outputs)
    lines.append(_commented(f"    return {outputs}", placed))
    return "\n".join(lines)


def diff_text(before: str, after: str, names: tuple[str, str]) -> str:
    """Unified diff; "" when nothing changed."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), *names, n=2, lineterm=""))


def _runs(nodes: Sequence[fx.Node], program: RankProgram) -> list[_Run]:
    runs: list[_Run] = []
    for node in nodes:
        module = _module(node, program)
        found = _LAYER.match(module)
        path = found.group() if found else ""
        if not module and runs and node.op != "placeholder":
            path = runs[-1].path  # an output of the statement before it
        if not runs or runs[-1].path != path:
            runs.append(_Run(path, []))
        runs[-1].lines.append(_statement(node, program))
    return runs


def _module(node: fx.Node, program: RankProgram) -> str:
    """The path of the module that the statement belongs to."""
    if node.op == "placeholder":
        spec = program.params.get(node.name)
        return spec.name if spec is not None else ""
    if node.meta.get("role") == "param_gather" and isinstance(node.args[0], fx.Node):
        return _module(node.args[0], program)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if entry and entry[0]]
    return paths[-1].removeprefix("L['self'].").removeprefix("model.") if paths else ""


def _folded(runs: list[_Run], full: bool) -> list[str]:
    lines: list[str] = []
    first: dict[tuple[str, str], str] = {}
    skipped: list[tuple[str, str]] = []

    def flush() -> None:
        if skipped:
            places = f"{skipped[0][0]} to {skipped[-1][0]}" if len(skipped) > 1 else skipped[0][0]
            kinds = sorted({like for _, like in skipped})
            lines.append(f"    # {places}: as {' and '.join(kinds)}")
            skipped.clear()

    for run in runs:
        key = (re.sub(r"\.\d+$", "", run.path), run.canonical())
        if not full and run.path and len(run.lines) >= _FEWEST_FOLDED and key in first:
            skipped.append((run.path, first[key]))
            continue
        first.setdefault(key, run.path)
        flush()
        if run.path:
            lines.append(f"    # {run.path}")
        lines += run.lines
    flush()
    return lines


def _statement(node: fx.Node, program: RankProgram) -> str:
    if node.op == "placeholder":
        return _placeholder(node, program)
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return _commented(f"    {node.name} = {_target(node)}({', '.join(arguments)})", _comment(node))


def _placeholder(node: fx.Node, program: RankProgram) -> str:
    spec = program.params.get(node.name)
    if spec is not None:
        return _commented(f"    {node.name},", f"{_shape(spec.shape, spec.dtype)} {_storage(spec)}".strip())
    item = program.inputs.get(node.name)
    kind = f"{item.kind} {item.name if item.name != node.name else ''}".strip() if item is not None else ""
    return _commented(f"    {node.name},", f"{_value(node.meta.get('val'))} {kind}".strip())


def _storage(spec: ParamSpec) -> str:
    pieces = [f"piece of dim {s.dim} over {s.axes}" for s in spec.shards]
    pieces += [f"gradient still to be summed over {axes}" for axes in spec.reduce_axes]
    return ", ".join([*pieces, *([] if spec.trainable else ["frozen"])])


def _comment(node: fx.Node) -> str:
    parts = [_value(node.meta.get("val"))]
    placement = node.meta.get("placement")
    if placement is not None:
        parts.append(", ".join(map(str, placement)) if isinstance(placement, tuple) else str(placement))
    axes = [str(a) for a in [*node.args, *node.kwargs.values()] if isinstance(a, str) and a.startswith(GROUP_PREFIX)]
    role = node.meta.get("role")
    if role is not None or axes:
        parts.append(f"<< {role or 'collective'}{f' over {axes[-1].removeprefix(GROUP_PREFIX)}' if axes else ''}")
    return "  ".join(part for part in parts if part)


def _commented(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {comment}" if comment else text


def _value(value: object) -> str:
    if isinstance(value, Tensor):
        return _shape(tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, (_value(item) for item in value)))
    return ""


def _shape(shape: Sequence[object], dtype: torch.dtype) -> str:
    return f"{_DTYPES.get(dtype, str(dtype))}[{', '.join(map(str, shape))}]"


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        name = f"{target.namespace}.{target.name().partition('::')[2]}"
        return name.removesuffix(".default").removesuffix(".Tensor")
    return str(getattr(target, "__name__", target))


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, str) and value.startswith(GROUP_PREFIX):
        return repr(value.removeprefix(GROUP_PREFIX))
    return repr(value)
