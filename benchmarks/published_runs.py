"""Prices published runs with the project's cost model: `evaluate(specs, transform)`.

Models are captured once each (and kept on disk by the capture cache); plans and the numeric view of a program are kept
in a `Pricer`. Changing constants of the hardware, as a calibration does, prices again and captures nothing:

    pricer = Pricer()
    outcomes = evaluate(specs, pricer=pricer)                                             # first captures
    outcomes = evaluate(specs, lambda spec, hw: replace(hw, sustained_fraction=0.9), pricer)  # about 2 seconds
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from published_models import POSITIONS, Model
from published_specs import RunSpec

from omnicompile.capture import config_source
from omnicompile.capture.api import capture_program
from omnicompile.capture.source import ModelSource
from omnicompile.capture.source_digest import digest
from omnicompile.cluster import Cluster
from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.step_model import StepModel
from omnicompile.cost_model.step_numbers import ProgramNumbers
from omnicompile.errors import InputError, OmniCompileError
from omnicompile.plan import Plan, Prediction
from omnicompile.planner.given import given_plan
from omnicompile.planner.predict import simulate
from omnicompile.program import Program, Segment
from omnicompile.workload import Workload

if TYPE_CHECKING:
    import torch

Transform = Callable[[RunSpec, Hardware], Hardware]
OVERHEAD = ("context", "allocator slack")


@dataclass(frozen=True)
class Outcome:
    """What the cost model says of a run. layout: as priced, an alternative chosen. refused: why it has no price."""

    spec: RunSpec
    layout: dict[str, str]
    prediction: Prediction | None
    parameters: int = 0
    refused: str = ""

    @property
    def seconds(self) -> float:
        assert self.prediction is not None
        return self.prediction.step_seconds

    @property
    def ratio(self) -> float | None:
        """Predicted over measured seconds."""
        if self.prediction is None or self.spec.seconds is None:
            return None
        return self.prediction.step_seconds / self.spec.seconds

    @property
    def memory(self) -> float:
        """Predicted bytes of the kind that was measured: those of tensors, with the allocator's slack if reserved, with
        the context too if of the whole device."""
        assert self.prediction is not None
        kinds = self.prediction.memory
        left_out = {"allocated": OVERHEAD, "reserved": OVERHEAD[:1]}.get(self.spec.memory_kind, ())
        return sum(value for kind, value in kinds.items() if kind not in left_out)

    @property
    def memory_ratio(self) -> float | None:
        """Predicted over measured peak memory."""
        if self.prediction is None or self.spec.memory is None:
            return None
        return self.memory / self.spec.memory


@dataclass
class Priced:
    """What one evaluation shares among runs: predictions of equal runs, models of a program, cluster and hardware, and
    (through the first of these) kernel times of a program and hardware."""

    predictions: dict[tuple[object, ...], Prediction] = field(default_factory=dict)
    _models: dict[tuple[object, ...], StepModel] = field(default_factory=dict)
    _first: dict[tuple[object, ...], StepModel] = field(default_factory=dict)

    def model(self, spec: RunSpec, program: Program, numbers: ProgramNumbers, hardware: Hardware) -> StepModel:
        program_key = (spec.model.config, spec.seq_len, hardware)
        key = (*program_key, spec.gpus, spec.gpus_per_node)
        if key not in self._models:
            whole = self._first.get(program_key)
            self._models[key] = StepModel(program, _cluster(spec), hardware, whole)
            if whole is None:
                self._models[key].numbers = numbers
                self._first[program_key] = self._models[key]
        return self._models[key]


@dataclass
class Pricer:
    """What pricing needs of the specs, made once. progress: called with each model that is captured."""

    progress: Callable[[str], None] = lambda _: None
    _programs: dict[str, Program | OmniCompileError] = field(default_factory=dict)
    _sized: dict[tuple[str, int], tuple[Program, ProgramNumbers]] = field(default_factory=dict)
    _chosen: dict[str, tuple[Plan, dict[str, str]] | OmniCompileError] = field(default_factory=dict)

    def program(self, spec: RunSpec) -> tuple[Program, ProgramNumbers]:
        """The program of the spec's model at its sequence length. Raises OmniCompileError if it cannot be captured."""
        key = (spec.model.config, spec.seq_len)
        if key not in self._sized:
            program = with_seq_len(self._captured(spec.model), spec)
            self._sized[key] = program, ProgramNumbers(program)
        return self._sized[key]

    def _captured(self, model: Model) -> Program:
        if model.config not in self._programs:
            self.progress(f"capturing {model.name}")
            try:
                self._programs[model.config] = capture_program(_source(model), Workload(seq_len=4096))
            except OmniCompileError as error:
                self._programs[model.config] = error
        found = self._programs[model.config]
        if isinstance(found, OmniCompileError):
            raise found
        return found

    def plan(self, spec: RunSpec) -> tuple[Plan, dict[str, str]]:
        """The plan of a spec and its layout: of the alternatives the first that fits into the memory of the spec's own
        hardware. Chosen once, so that other constants change prices and not layouts."""
        if spec.id not in self._chosen:
            try:
                self._chosen[spec.id] = self._choose(spec)
            except OmniCompileError as error:
                self._chosen[spec.id] = error
        found = self._chosen[spec.id]
        if isinstance(found, OmniCompileError):
            raise found
        return found

    def _choose(self, spec: RunSpec) -> tuple[Plan, dict[str, str]]:
        changes = spec.layout.alternatives or ({},)
        for change in changes:
            layout = spec.layout.layout | change
            plan = self._given(spec, layout)
            if change is changes[-1] or _fits(self.price(spec, plan, layout, spec.hardware, Priced())):
                break
        return plan, layout

    def _given(self, spec: RunSpec, layout: dict[str, str]) -> Plan:
        program, _ = self.program(spec)
        workload = Workload(seq_len=spec.seq_len, global_batch=spec.global_batch)
        return given_plan(program, _cluster(spec), workload, layout, spec.id)

    def price(self, spec: RunSpec, plan: Plan, layout: dict[str, str], hardware: Hardware, done: Priced) -> Prediction:
        """done: what this evaluation has priced already."""
        program, numbers = self.program(spec)
        work = (spec.model.config, spec.seq_len, spec.gpus, spec.gpus_per_node, spec.global_batch)
        key = (*work, tuple(sorted(layout.items())), hardware)
        if key not in done.predictions:
            prediction = simulate(program, plan, done.model(spec, program, numbers, hardware)).prediction
            assert prediction is not None
            done.predictions[key] = prediction
        return done.predictions[key]


def evaluate(
    specs: Sequence[RunSpec], transform: Transform | None = None, pricer: Pricer | None = None
) -> list[Outcome]:
    """What the cost model says of each run. transform: changes a run's hardware before it is priced."""
    pricer, done = pricer or Pricer(), Priced()
    hardware = [transform(spec, spec.hardware) if transform else spec.hardware for spec in specs]
    return [_outcome(spec, own, pricer, done) for spec, own in zip(specs, hardware)]


def _outcome(spec: RunSpec, hardware: Hardware, pricer: Pricer, done: Priced) -> Outcome:
    try:
        plan, layout = pricer.plan(spec)
        prediction = pricer.price(spec, plan, layout, hardware, done)
        return Outcome(spec, layout, prediction, pricer.program(spec)[0].param_count)
    except OmniCompileError as error:
        return Outcome(spec, spec.layout.layout, None, refused=str(error).splitlines()[0])


def _fits(prediction: Prediction) -> bool:
    """Whether tensors and context fit: a run that was published had its allocator's slack under control."""
    kinds = prediction.memory
    return sum(value for kind, value in kinds.items() if kind != "allocator slack") <= prediction.memory_capacity


def _cluster(spec: RunSpec) -> Cluster:
    return Cluster(spec.gpus, spec.gpu, spec.gpus_per_node)


def _source(model: Model) -> ModelSource:
    """A source for the capture cache: the same configuration is captured once, whatever the row calls it."""
    content = model.config.encode()
    name = f"published-{hashlib.sha256(content).hexdigest()[:12]}"
    return ModelSource(name, name, lambda: _built(model, name), digest("config", "", {"config.json": content}))


def _built(model: Model, name: str) -> torch.nn.Module:
    try:
        return config_source.build(model.data, Path(name))
    except ValueError as error:  # sizes that do not go together
        raise InputError(f"{model.name} cannot be built: {' '.join(str(error).split())}") from error


def with_seq_len(program: Program, spec: RunSpec) -> Program:
    """`program` for samples of the spec's length. A table of learned positions becomes as long as the sequence."""
    program = replace(program, sample=replace(program.sample, seq_len=spec.seq_len))
    if not spec.model.learned_positions:
        return program
    return replace(program, segments=tuple(_with_positions(s, spec.seq_len) for s in program.segments))


def _with_positions(segment: Segment, rows: int) -> Segment:
    """The segment with `rows` rows in parameters of POSITIONS rows, and what its operators read and write of them."""
    tables = [p for p in segment.params if p.shape[0] == POSITIONS]
    if not tables:
        return segment
    bytes_of_table = {2 * p.numel: 2 * p.numel * rows // POSITIONS for p in tables}
    params = tuple(replace(p, shape=(rows, *p.shape[1:])) if p in tables else p for p in segment.params)
    ops = tuple(replace(op, param_bytes=bytes_of_table.get(op.param_bytes, op.param_bytes)) for op in segment.ops)
    return replace(segment, params=params, ops=ops)


def note(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)
