"""What a calibrated hardware file says about itself: where each constant comes from."""

from __future__ import annotations

from omnicompile.cost_model.hardware import Hardware
from omnicompile.cost_model.measurements import Measurements


def head_lines(measured: Measurements) -> list[str]:
    """The lines above a file's constants."""
    machine = measured.machine
    lines = [f"{machine.description}; measured by `omnicompile calibrate`, all ranks at work at the same time"]
    lines += [f"{key}: {value}" for key, value in machine.facts.items()]
    lines.append(f"ranks: {machine.ranks}, {machine.ranks_per_node} on a node; timed: {measured.points} shapes")
    lines += [f"note: {note}" for note in measured.notes]
    lines.append("Formulas are in docs/cost_model.md. (fit): to that many shapes, on the logarithm of time.")
    return lines


def comments(measured: Measurements, base: Hardware | None) -> dict[str, str]:
    """By dotted key of the file."""
    cpu = measured.machine.device == "cpu"
    known = "" if base is None else base.name
    share = "main memory divided by the ranks of the machine" if cpu else "total, as the driver reports it"
    found = {
        "memory_bytes": share,
        "context_bytes": "of a process before it holds a tensor" if cpu else "beside torch's allocator, as measured",
        "memory_reserve_fraction": f"as {known}" if known else "fragmentation; assumed",
        "peak_flops": f"data sheet, as {known}" if known else "FLOP/s of the best GEMM",
        "memory_bandwidth": f"data sheet, as {known}" if known else "bytes/s of the best memory-bound kernel",
        "memory_fraction": _fit(len(measured.memory)),
        "sm_count": "the cores of a rank work as one" if cpu else "multiprocessors",
        "kernel_launch_seconds": "(fit) with memory_fraction" if cpu else "a kernel that does nothing, queued",
        "kernel_overhead_seconds": "the same: nothing is queued on a CPU",
        "sustained_fraction": _sustained(measured, known),
        "gemm": _fit(len(measured.gemms)) + f"; grouped_tokens {_fit(len(measured.grouped))}",
        "attention": f"torch: our programs' attention {_fit(len(measured.attention))}",
        "contention_factor": "measured: GEMMs beside an all-gather"
        if measured.together
        else _taken(known, "0 assumed"),
    }
    return found | _links(measured, known)


def _links(measured: Measurements, known: str) -> dict[str, str]:
    inside = [row for row in measured.collectives if row.ranks <= row.ranks_per_node]
    across = [row for row in measured.collectives if row.ranks > row.ranks_per_node]
    cpu = measured.machine.device == "cpu"
    network = "as the link inside; one machine was measured" if cpu else _taken(known, "assumed")
    best = f"data sheet, as {known}" if known else "the best rate of a collective"
    return {
        "intra_link": best if inside else _taken(known, "assumed: nothing was measured"),
        "inter_link": (f"data sheet, as {known}" if known else "best rate of a collective") if across else network,
        "host_link": "pinned copies"
        if measured.host_copy
        else ("copies in memory" if cpu else _taken(known, "assumed")),
        "collective": _fit(len(measured.collectives)) if measured.collectives else _taken(known, "not measured"),
    }


def _fit(points: int) -> str:
    return f"(fit) {points} shapes" if points else "not measured"


def _taken(known: str, otherwise: str) -> str:
    return f"not measured: as {known}" if known else otherwise


def _sustained(measured: Measurements, known: str) -> str:
    if measured.sustained is not None:
        return "GEMMs at the end of some seconds of them, relative to a short burst"
    return _taken(known, "not measured")
