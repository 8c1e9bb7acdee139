"""Words about plans: what limits the best one, why the others lost, and what is missing when nothing fits."""

from __future__ import annotations

from dataclasses import replace

from omnicompile.plan import Plan, Prediction
from omnicompile.support import not_executable

GIB = 2.0**30


def notes(plan: Plan, refused: dict[str, str]) -> tuple[str, ...]:
    """What limits a plan: memory, exposed communication; and which larger degrees were refused."""
    prediction = _prediction(plan)
    lines = [_memory_note(prediction), _time_note(prediction)]
    if plan.mesh.ep > 1:
        lines.append(f"expert parallelism is priced with balanced routing over {plan.mesh.ep} ranks")
    lines += [f"priced, not executable yet: {choice}" for choice in not_executable(plan)]
    lines += [f"not taken: {reason}" for reason in list(dict.fromkeys(refused.values()))[:3]]
    return tuple(lines)


def _memory_note(prediction: Prediction) -> str:
    kind = max(prediction.memory, key=lambda k: prediction.memory[k])
    share = prediction.memory_total / prediction.memory_capacity
    limit = "memory is nearly full" if share > 0.9 else "memory is not the limit" if share < 0.7 else "memory"
    return (
        f"{limit}: {prediction.memory_total / GIB:.1f} of {prediction.memory_capacity / GIB:.1f} GiB per GPU, "
        f"most of it {kind} ({prediction.memory[kind] / GIB:.1f} GiB)"
    )


def _time_note(prediction: Prediction) -> str:
    exposed = {k.removeprefix("exposed "): v for k, v in prediction.time.items() if k.startswith("exposed ")}
    total = sum(exposed.values())
    share = total / prediction.step_seconds
    if not exposed or share < 0.02:
        return "compute is the limit: communication is hidden behind it"
    kind = max(exposed, key=lambda k: exposed[k])
    return f"{share:.0%} of the step waits for communication, most for {kind} ({exposed[kind]:.3f} s)"


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None, "the plan has not been simulated"
    return plan.prediction


def why_lost(plan: Plan, best: Plan) -> str:
    """One line: by how much a plan is slower than the best, and in what."""
    mine, other = _prediction(plan), _prediction(best)
    slower = mine.step_seconds / other.step_seconds - 1
    causes = {kind: _blocking(mine, kind) - _blocking(other, kind) for kind in {*mine.time, *other.time}}
    causes = {kind: seconds for kind, seconds in causes.items() if seconds > 0}
    if slower <= 0:
        return "equally fast"
    kind = max(causes, key=lambda k: causes[k], default="")
    where = f", most in {kind} (+{causes[kind]:.3f} s)" if kind else ""
    return f"{slower:.1%} slower{where}"


def _blocking(prediction: Prediction, kind: str) -> float:
    return 0.0 if kind.startswith("hidden ") else prediction.time.get(kind, 0.0)


def infeasible_message(leanest: Plan, needed: float, changes: list[str], pins: str) -> str:
    """One line: what is short by how much for the leanest plan, and what would fit."""
    prediction = _prediction(leanest)
    short = prediction.memory_total - prediction.memory_capacity
    largest = sorted(prediction.memory, key=lambda k: -prediction.memory[k])[:2]
    parts = ", ".join(f"{kind} {prediction.memory[kind] / GIB:.1f} GiB" for kind in largest)
    under = f" under the pins {pins}" if pins else ""
    remedy = f" What would fit: {'; '.join(changes)}." if changes else ""
    return (
        f"nothing fits on {leanest.cluster.gpus} x {leanest.cluster.gpu}{under}: the leanest plan "
        f"({_describe(leanest)}) needs {prediction.memory_total / GIB:.1f} GiB per GPU of "
        f"{prediction.memory_capacity / GIB:.1f} GiB, {short / GIB:.1f} GiB too much (most: {parts}).{remedy}"
    )


def _describe(plan: Plan) -> str:
    mesh = plan.mesh
    words = [f"sp={mesh.sp}", f"micro-batch {plan.micro_batch}"]
    if mesh.ep > 1:
        words.insert(1, f"ep={mesh.ep}")
    recompute = {str(b.recompute) for b in plan.blocks.values() if not b.frozen}
    words.append("recompute " + "/".join(sorted(recompute)) if recompute else "all frozen")
    if any(b.offload for b in plan.blocks.values()):
        words.append("activations offloaded")
    if plan.offload_optimizer:
        words.append("optimizer offloaded")
    return ", ".join(words)


def with_notes(plan: Plan, refused: dict[str, str]) -> Plan:
    return replace(plan, notes=notes(plan, refused))
