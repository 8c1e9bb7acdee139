"""What a user names as a model, as one thing: a `ModelSource` that can build it without memory for its weights.

Accepted: a python file with build() (and optionally workload() and inputs()), `file.py:function`, a Hugging Face
`config.json` or a directory that holds one, and `package.module:Class` (with a config.json). torch and transformers are
imported by the first build, so that a cached capture needs neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omnicompile.capture import config_source
from omnicompile.capture.source_digest import digest, file_sources, package_sources
from omnicompile.errors import InputError, OmniCompileError
from omnicompile.workload import Workload

if TYPE_CHECKING:
    import torch

Build = Callable[[], "torch.nn.Module"]
ACCEPTED = "give a python file with build(), file.py:function, a config.json, or package.module:Class"


@dataclass(frozen=True)
class ModelSource:
    """A model as the user named it.

    name: for reports. spec: what the user typed. build: makes the module on the device of the surrounding context.
    workload: what the user's file says a sample looks like, if it does. inputs: the user's own forward arguments for a
    Workload (ignored by an inputs() without a parameter), if given; `inputs_vary` tells whether it takes one.
    tiny: makes the same model with small sizes, if the user's file offers it.
    source_digest: hash of all that the model is made from, "" where it is unknown and captures must not be cached.
    """

    name: str
    spec: str
    build: Build
    source_digest: str
    workload: Workload | None = None
    inputs: Callable[[Workload | None], dict[str, Any]] | None = None
    inputs_vary: bool = False
    tiny: Build | None = None

    @property
    def cacheable(self) -> bool:
        return bool(self.source_digest)

    def build_meta(self) -> torch.nn.Module:
        """The module with every tensor on the meta device. Raises InputError if it cannot be built."""
        import torch

        with torch.device("meta"):
            module = self.build()
        if isinstance(module, torch.nn.Module):
            return module
        raise InputError(f"{self.spec}: must return a torch.nn.Module, and returned a {type(module).__name__}")


def load_model_source(spec: str, config: str | None = None) -> ModelSource:
    """The model that `spec` names. Raises InputError naming what is wrong with it."""
    path, colon, function = spec.rpartition(":")
    if spec.endswith(".py"):
        path, function = spec, "build"
    if path.endswith(".py"):
        _refuse_config(spec, config)
        return _from_file(spec, Path(path), function)
    if spec.endswith(".json") or Path(spec).is_dir():
        _refuse_config(spec, config)
        return _from_config(spec, Path(spec))
    if colon:
        return _from_import(spec, path, function, config)
    if Path(spec).exists():
        raise InputError(f"{spec} is not a model: {ACCEPTED}")
    hub = "; names on a hub are not downloaded" if spec.count("/") == 1 else ""
    raise InputError(f"{spec} does not exist{hub}: {ACCEPTED}")


def source_of(model: str | Path | torch.nn.Module | Build, config: str | None = None) -> ModelSource:
    """`load_model_source` for names; a module or a function that builds one as a source that is not cached."""
    if isinstance(model, (str, Path)):
        return load_model_source(str(model), config)
    import torch

    if isinstance(model, torch.nn.Module):
        module = model
        return ModelSource(type(module).__name__, type(module).__name__, lambda: meta_copy(module), "")
    if not callable(model):
        raise InputError(f"a model must be a path, a module or a function that builds one, got {type(model).__name__}")
    name = str(getattr(model, "__qualname__", type(model).__name__))
    return ModelSource(name, name, _guarded(model, f"{name}()", None), "")


def meta_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` with parameters and buffers on the meta device; `module` is left as it is."""
    import copy

    import torch

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = empty
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _refuse_config(spec: str, config: str | None) -> None:
    if config is not None:
        raise InputError(f"--config goes with package.module:Class; {spec} says itself what to build")


def _from_file(spec: str, path: Path, function: str) -> ModelSource:
    if not path.is_file():
        raise InputError(f"{path} does not exist: {ACCEPTED}")
    module = _run_file(path)
    functions = _functions(module)
    if function not in functions:
        raise InputError(_no_function(path, function, functions))
    workload, inputs, vary = None, None, False
    if "workload" in functions:
        workload = _user_workload(_guarded(functions["workload"], f"{path}: workload()", path)())
    if "inputs" in functions:
        inputs, vary = _user_inputs(functions["inputs"], path)
    return ModelSource(
        name=path.stem if function == "build" else f"{path.stem}:{function}",
        spec=spec,
        build=_guarded(functions[function], f"{path}: {function}()", path),
        source_digest=digest("file", function, file_sources(path)),
        workload=workload,
        inputs=inputs,
        inputs_vary=vary,
        tiny=_guarded(functions["tiny"], f"{path}: tiny()", path) if "tiny" in functions else None,
    )


def _from_config(spec: str, path: Path) -> ModelSource:
    file = config_source.config_file(path)
    data = config_source.read_config(file)
    return ModelSource(
        name=config_source.config_name(data, file),
        spec=spec,
        build=_guarded(lambda: config_source.build(data, file), f"{file}: building the model", None),
        source_digest=digest("config", "", {"config.json": file.read_bytes()}),
    )


def _from_import(spec: str, module_name: str, name: str, config: str | None) -> ModelSource:
    try:
        with _blame(f"importing {module_name}", None):
            module = importlib.import_module(module_name)
    except InputError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise InputError(f"{spec}: there is no module {error.__cause__.name!r} to import") from error.__cause__
        raise
    try:
        target = getattr(module, name)  # packages that import lazily have no such name in vars()
    except AttributeError as error:
        close = get_close_matches(name, dir(module), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"{spec}: {module_name} has no {name}{hint}") from error
    if not callable(target):
        raise InputError(f"{spec}: {name} is a {type(target).__name__}, not a class or a function")
    sources = package_sources(module)
    data: Mapping[str, Any] | None = None
    if config is not None:
        file = config_source.config_file(Path(config))
        data = config_source.read_config(file)
        sources["config.json"] = file.read_bytes()
    build = config_source.builder(target, data, spec, config)
    title = module_name.rpartition(".")[2] if name == "build" else name
    return ModelSource(title, spec, _guarded(build, spec, None), digest("import", spec, sources))


def _run_file(path: Path) -> ModuleType:
    """The user's file as a module, its directory importable as for `python file.py`."""
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = f"omnicompile_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    with _blame(f"{path}: importing it", path):
        spec.loader.exec_module(module)
    return module


def _functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Functions and classes that the file itself defines, and what it assigns to build, workload and inputs."""
    special = ("build", "workload", "inputs")
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and (name in special or getattr(value, "__module__", None) == module.__name__)
    }


def _no_function(path: Path, function: str, functions: Mapping[str, Any]) -> str:
    names = [name for name, value in functions.items() if inspect.isfunction(value)]
    if function != "build":
        return f"{path} has no function {function}; it defines {', '.join(names) or 'none'}"
    if names:
        has = f"it defines {', '.join(names)}"
        return f"{path} has no build(); {has}: name one, as in {path}:{names[-1]}, or add def build() -> nn.Module"
    return f"{path} has no build() and no other function: add def build() that returns the nn.Module"


def _user_workload(value: Any) -> Workload:
    if isinstance(value, Workload):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"workload() must return a Workload or a dict, and returned a {type(value).__name__}")
    from omnicompile.schema import Place, decode, encode

    result = decode(Workload, encode(dict(value)), Place("workload()"))
    assert isinstance(result, Workload)
    return result


def _user_inputs(function: Callable[..., Any], path: Path) -> tuple[Callable[[Workload | None], dict[str, Any]], bool]:
    takes_workload = bool(inspect.signature(function).parameters)
    call = _guarded(function, f"{path}: inputs()", path)

    def inputs(workload: Workload | None = None) -> dict[str, Any]:
        value = call(workload or Workload()) if takes_workload else call()
        if not isinstance(value, Mapping):
            raise InputError(
                f"{path}: inputs() must return a dict of the forward's arguments, and returned a {type(value).__name__}"
            )
        return dict(value)

    return inputs, takes_workload


def _guarded(function: Callable[..., Any], what: str, file: Path | None) -> Callable[..., Any]:
    """`function` with its errors as one line that names the user's file and line."""

    def call(*args: Any) -> Any:
        with _blame(what, file):
            return function(*args)

    return call


@contextmanager
def _blame(what: str, file: Path | None) -> Iterator[None]:
    try:
        yield
    except OmniCompileError:
        raise
    except (Exception, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise InputError(f"{what} raised {message} ({_location(error, file)})") from error


def _location(error: BaseException, file: Path | None) -> str:
    """file:line of the innermost frame in the user's file, or of the innermost frame if none is."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if file is not None and Path(frame.filename).resolve() == file.resolve()]
    frame = (mine or list(frames))[-1]
    return f"{file if mine else frame.filename}:{frame.lineno}"
