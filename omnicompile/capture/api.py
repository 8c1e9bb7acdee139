"""`capture_program`: a model source and a workload to a Program, through an on-disk cache."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.capture.source import ModelSource
from omnicompile.errors import CaptureError
from omnicompile.program import Program, SampleShape
from omnicompile.workload import Workload

if TYPE_CHECKING:
    from torch import nn

    from omnicompile.capture.inputs.types import ExampleInputs, InputConstraints

Progress = Callable[[str], None]


def silent(_: str) -> None:
    """A progress function that says nothing."""


@dataclass(frozen=True)
class Capture:
    """What is cached: the Program, and what turns another workload into its sample shape.

    limits / generic are None for models with their own inputs(), which are planned at those inputs only.
    """

    program: Program
    limits: InputConstraints | None
    generic: ExampleInputs | None

    def for_workload(self, workload: Workload) -> Program:
        """The Program with the sample of `workload`."""
        if self.limits is None or self.generic is None:
            return self.program
        from omnicompile.capture.sample import sample_shape

        return replace(self.program, sample=sample_shape(self.limits, self.generic, workload))


def capture_program(
    source: ModelSource, workload: Workload, cache: bool = True, progress: Progress = silent
) -> Program:
    """Trace the model that `source` names, or take it from the cache.

    The same model is captured once for all sequence lengths, image sizes and numbers of images. Raises CaptureError or
    InputError.
    """
    path = _cache_path(source, workload) if cache and source.cacheable else None
    found = _load(path) if path is not None else None
    if found is None:
        found = _capture(source, workload, progress)
        if path is not None:
            _store(path, found)
    else:
        progress("taken from the capture cache")
    return found.for_workload(workload)


def capture_model(model: nn.Module, workload: Workload, name: str = "", progress: Progress = silent) -> Program:
    """Trace a model object (on any device; its weights are not touched). Nothing is cached."""
    title = name or type(model).__name__
    return _capture_noted(model, workload, title, title, progress).for_workload(workload)


def _capture(source: ModelSource, workload: Workload, progress: Progress) -> Capture:
    progress("building the model without weights")
    model = source.build_meta()
    if source.inputs is not None:
        return _capture_with_inputs(model, source, workload, progress)
    return _capture_noted(model, workload, source.name, source.spec, progress)


def _capture_noted(model: nn.Module, workload: Workload, name: str, spec: str, progress: Progress) -> Capture:
    """The capture, with notes in its Program of what the configuration left open."""
    from omnicompile.capture.inputs.stand_ins import placeholders_filled

    with placeholders_filled(model) as notes:
        found = _capture_module(model, workload, name, spec, progress)
        more = (*notes, *_size_notes(model, found.limits))
    return replace(found, program=replace(found.program, notes=(*found.program.notes, *more)))


def _size_notes(model: nn.Module, used: InputConstraints | None) -> list[str]:
    """How the sizes that a capture kept to differ from what the configuration says."""
    from omnicompile.capture.inputs import input_constraints

    if used is None or used.images is None:
        return []
    found = [used.images.note] if used.images.note else []
    if used.rows is not input_constraints(model).rows:
        found.append(f"a text row of at most {used.max_seq_len} tokens: planned with one image per row")
    return found


def _capture_module(model: nn.Module, workload: Workload, name: str, spec: str, progress: Progress) -> Capture:
    from omnicompile.capture.build import build_program
    from omnicompile.capture.generic import generic_request, generic_sizes, lengthened, loops_over_tokens, shortened
    from omnicompile.capture.inputs import input_constraints, make_inputs
    from omnicompile.capture.inputs.types import Rows, TextTooShort
    from omnicompile.capture.sample import sample_shape
    from omnicompile.capture.trace import trace_forward

    model.train()
    limits = input_constraints(model)
    wanted = generic_request(limits, workload)
    progress("making example inputs")
    try:
        generic = make_inputs(model, wanted.request, check=False)
    except TextTooShort as short:  # tiles and separators of images were not foreseen
        if wanted.rows_fixed or (limits.max_seq_len is not None and limits.images is None):
            raise
        if limits.max_seq_len is not None:  # one row cannot hold as many images as a capture needs
            limits = replace(limits, rows=Rows.IMAGES)
            wanted = generic_request(limits, workload)
        else:
            wanted = lengthened(wanted, short.needed)
        generic = make_inputs(model, wanted.request, check=False, limits=limits)
    shorter = shortened(wanted, generic)
    if 2 * shorter.request.seq_len < generic.seq_len and not wanted.rows_fixed and loops_over_tokens(model):
        wanted, generic = shorter, make_inputs(model, shorter.request, check=False, limits=limits)
    progress("tracing the forward")
    try:
        traced = trace_forward(model, generic.kwargs, generic.host)
    except CaptureError:
        # Control flow that reads token ids needs them as metadata; finding that out takes a forward of its own.
        checked = make_inputs(model, wanted.request, check=True, limits=limits)
        if checked.host == generic.host:
            raise
        generic = checked
        traced = trace_forward(model, generic.kwargs, generic.host)
    sample = sample_shape(limits, generic, workload)
    program = build_program(model, traced, generic_sizes(generic, wanted), sample, name, spec, progress)
    return Capture(program, limits, replace(generic, kwargs={}))


def _capture_with_inputs(model: nn.Module, source: ModelSource, workload: Workload, progress: Progress) -> Capture:
    from omnicompile.capture.build import build_program
    from omnicompile.capture.trace import trace_forward
    from omnicompile.capture.user_inputs import batch_scaled, split_user_inputs

    assert source.inputs is not None
    progress("tracing the forward")
    kwargs = source.inputs(workload)
    given = split_user_inputs(kwargs)
    model.train()
    traced = trace_forward(model, given.kwargs, given.host)
    sample = SampleShape(seq_len=given.seq_len, images=given.images, clips=given.clips)
    program = build_program(model, traced, [], sample, source.name, source.spec, progress)
    return Capture(batch_scaled(program), None, None)


def _cache_directory() -> Path:
    root = os.environ.get("OMNICOMPILE_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "omnicompile"


def _cache_path(source: ModelSource, workload: Workload) -> Path:
    """Keyed by all that a capture depends on. Of the workload that is what cannot be put in afterwards: the length of
    text rows that a model binds, and everything for a model with its own inputs()."""
    parts: list[Any] = [_own_sources(), source.spec, source.source_digest, version("torch"), version("transformers")]
    parts += [version("omnicompile"), workload.seq_len if source.inputs is None else workload.to_dict()]
    if source.inputs is None:
        parts[-1] = min(workload.seq_len, 4096)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return _cache_directory() / f"{digest}.capture"


def _own_sources() -> str:
    """A digest of the code that makes captures, so that an edit of it never meets an old capture."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted([*package.glob("capture/**/*.py"), *package.glob("anchors/*.py"), package / "program.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _load(path: Path) -> Capture | None:
    """A cached capture; None if there is none or it cannot be read (then it is captured again)."""
    try:
        data = path.read_bytes()
        found = pickle.loads(data)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError, IndexError):
        return None
    return found if isinstance(found, Capture) else None


def _store(path: Path, capture: Capture) -> None:
    """Written whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(pickle.dumps(capture))
        os.replace(file.name, path)
    except OSError:
        return
