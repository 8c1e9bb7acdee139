"""A hash of everything local that a model is made from, so that a cached capture is never that of an older file."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

_DATA = (".yaml", ".yml", ".json", ".toml")


def digest(kind: str, name: str, sources: dict[str, bytes]) -> str:
    """Hash of the kind of source, what is built from it, and the content of every file, by name."""
    result = hashlib.sha256()
    for part in (kind.encode(), name.encode(), *(p for key in sorted(sources) for p in (key.encode(), sources[key]))):
        result.update(len(part).to_bytes(8, "big") + part)
    return result.hexdigest()


def file_sources(path: Path) -> dict[str, bytes]:
    """The file, the files and packages beside it that it imports, directly or through each other, and the data files
    that these name (`data_files`)."""
    root = path.resolve().parent
    found: dict[str, bytes] = {}
    queue = [path.resolve()]
    while queue:
        file = queue.pop()
        key = str(file.relative_to(root))
        if key in found:
            continue
        found[key] = file.read_bytes()
        for name in _imported(found[key]):
            if (root / f"{name}.py").is_file():
                queue.append(root / f"{name}.py")
            elif (root / name / "__init__.py").is_file():
                queue.extend(sorted((root / name).rglob("*.py")))
    return found | data_files(root, found.values())


def data_files(root: Path, sources: Iterable[bytes]) -> dict[str, bytes]:
    """Configuration files below `root` that the sources name, and those beside them, which they may refer to.

    A file is found by a string that is its path from `root`, or from a folder that another string names, as in
    `root / "configs" / "small.yaml"`.
    """
    words = {word for source in sources for word in _strings(source)}
    folders = [root, *(folder for word in words if word.strip("./") and (folder := root / word).is_dir())]
    named = {(folder / word).resolve() for folder in folders for word in words if word.endswith(_DATA)}
    beside = {file for path in named if path.is_file() for file in path.parent.iterdir() if file.suffix in _DATA}
    return {os.path.relpath(file, root): file.read_bytes() for file in beside if file.is_file()}


def package_sources(module: ModuleType) -> dict[str, bytes]:
    """Every file of the top-level package of `module`, and the data files that the module itself names; for an
    installed package its version instead."""
    top = module.__name__.partition(".")[0]
    package = sys.modules[top]
    if package.__file__ is None:
        return {top: b""}
    file = Path(package.__file__).resolve()
    if _installed(file):
        return {top: _version(package).encode()}
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    found = {str(entry.relative_to(file.parent)): entry.read_bytes() for entry in files}
    own = Path(module.__file__ or file)
    return found | data_files(own.parent, [own.read_bytes()])


def _nodes(source: bytes) -> Iterator[ast.AST]:
    """Of a file that is no Python there are none."""
    with contextlib.suppress(SyntaxError):
        yield from ast.walk(ast.parse(source))


def _strings(source: bytes) -> set[str]:
    """Short strings in a file's code."""
    constants = (node.value for node in _nodes(source) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and len(value) < 200 and "\0" not in value}


def _imported(source: bytes) -> set[str]:
    """Top-level names of all imports in a file, those inside functions included."""
    names: set[str] = set()
    for node in _nodes(source):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _installed(file: Path) -> bool:
    roots = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_paths()["stdlib"]]
    return any(file.is_relative_to(Path(root).resolve()) for root in roots)


def _version(package: ModuleType) -> str:
    try:
        return version(package.__name__)
    except PackageNotFoundError:
        return str(getattr(package, "__version__", ""))
