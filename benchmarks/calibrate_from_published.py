"""Fit the cost model's efficiency constants to the published measurements in benchmarks/data, and show the errors.

    python benchmarks/calibrate_from_published.py            # fit, print constants and errors
    python benchmarks/calibrate_from_published.py --check    # errors of the hardware files as they are
    python benchmarks/calibrate_from_published.py --write    # fit and put the constants into cost_model/hardware/*.yaml

Three groups of constants, each fitted by itself on the logarithm of time (soft L1 loss): GEMM, attention, collectives.
"held out" is the error on a source when the constants are fitted without it, where other sources determine them.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omnicompile.cost_model.calibration import Group, Point, errors_of, number_text
from omnicompile.cost_model.collectives import collective_seconds
from omnicompile.cost_model.hardware import AttentionEfficiency, Hardware, Link, load_hardware
from omnicompile.cost_model.kernels import attention_seconds, gemm_seconds, grouped_gemm_seconds

ROOT = Path(__file__).resolve().parent
YAML = ROOT.parent / "cost_model" / "hardware"
Machines = dict[str, Hardware]
MachinePoint = Point[Machines]
Points = list[MachinePoint]
MEASURED_ELEMENTS = 16384 * 2048.0  # the FlashAttention papers: 16k tokens, hidden size 2048
FA3_BACKWARD_OVER_FA2 = 1.65  # the FlashAttention-3 paper states 1.5 to 1.75
MAMF = {"a100": 271.2 / 312, "a100pcie": 252.9 / 312, "h100": 794.5 / 989, "b200": 1745 / 2250}
MAMF_FP8 = {"h100": 1402.6 / 1979, "b200": 3432.5 / 4500}
HOPPER = ("h100", "h200", "h800")


def machines() -> Machines:
    """The hardware files, and variants that only measurements need."""
    known = {name: load_hardware(name) for name in ("a100", "h100", "h200", "h800", "b200")}
    known = {name: replace(hw, sustained_fraction=1.0) for name, hw in known.items()}  # these are short benchmarks
    best = known["a100"].gemm.max_fraction
    slower = {dtype: value * MAMF["a100pcie"] / MAMF["a100"] for dtype, value in best.items()}
    pcie_gemm = replace(known["a100"].gemm, max_fraction=slower)
    known["a100pcie"] = replace(known["a100"], name="a100pcie", memory_bandwidth=1.935e12, gemm=pcie_gemm)
    known["h100fa2"] = replace(known["h100"].with_attention_kernel("fa2"), name="h100fa2")
    return known


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "data" / name).open() as file:
        return list(csv.DictReader(file))


# GEMM -----------------------------------------------------------------------------------------------------------------


def gemm_points() -> Points:
    points = []
    for row in rows("kernels.csv"):
        numbers = {key.lower(): float(value) for key, value in re.findall(r"(\w+)=(\d+)", row["shape"])}
        source = row["source"].split(" ")[0]
        if row["op"] == "matmul":
            m, n, k = (numbers[key] for key in "mnk")
            points.append(_gemm(source, "a100pcie", "bfloat16", m, n, k, row))
        elif row["op"] == "gemm" and source == "DeepGEMM":
            points.append(_gemm(source, "h800", "float8", numbers["m"], numbers["n"], numbers["k"], row))
        elif row["op"] in ("group_matmul", "grouped_gemm (MoE)"):
            simumax = row["op"] == "group_matmul"
            experts, tokens = (numbers["ng"], numbers["m"]) if simumax else (numbers["groups"], numbers["m_per_group"])
            machine, dtype = ("a100pcie", "bfloat16") if simumax else ("h800", "float8")
            shape = (experts, tokens, numbers["n"], numbers["k"])
            points.append(_grouped(source + " grouped", machine, dtype, *shape, row))
    for row in rows("kernels.csv"):
        if row["source"].startswith("EleutherAI") and re.search(r"\(4x\d+x\d+, b=2048\)", row["shape"]):
            k, n = (float(value) for value in re.findall(r"4x(\d+)x(\d+)", row["shape"])[0])
            points.append(_gemm("EleutherAI", "a100", "float16", 8192.0, n, k, row))
    return points


def _gemm(source: str, machine: str, dtype: str, m: float, n: float, k: float, row: dict[str, str]) -> MachinePoint:
    seconds = 2 * m * n * k / (float(row["tflops"]) * 1e12)
    return Point(source, seconds, lambda known: gemm_seconds(m, n, k, 1.0, dtype, known[machine]))


def _grouped(
    source: str, machine: str, dtype: str, experts: float, tokens: float, n: float, k: float, row: dict[str, str]
) -> MachinePoint:
    seconds = 2 * experts * tokens * n * k / (float(row["tflops"]) * 1e12)
    return Point(source, seconds, lambda known: grouped_gemm_seconds(tokens, n, k, experts, dtype, known[machine]))


def with_gemm(known: Machines, x: Sequence[float]) -> Machines:
    """x: typical over best-shape rate, small_tile_fraction, store_fraction, grouped_tokens."""
    out = {}
    for name, hw in known.items():
        best = MAMF.get(name, MAMF["a100"] if name.startswith("a100") else MAMF["h100"])
        half = {dtype: x[0] * best for dtype in ("bfloat16", "float16", "tfloat32") if dtype in hw.peak_flops}
        fp8 = {"float8": x[0] * MAMF_FP8.get(name, MAMF_FP8["h100"])} if "float8" in hw.peak_flops else {}
        fractions = {"float32": hw.gemm.max_fraction["float32"], **half, **fp8}
        gemm = replace(
            hw.gemm, max_fraction=fractions, small_tile_fraction=x[1], store_fraction=x[2], grouped_tokens=x[3]
        )
        out[name] = replace(hw, gemm=gemm)
    return out


# Attention ------------------------------------------------------------------------------------------------------------


def attention_points() -> Points:
    points = []
    for row in rows("kernels.csv"):
        shape = re.fullmatch(r"seqlen=(\d+)(k?),head_dim=(\d+)", row["shape"])
        if row["kernel"] in ("FlashAttention-2", "FlashAttention-3") and shape:
            length, dim = float(shape[1]) * (1024 if shape[2] else 1), float(shape[3])
            hopper = row["gpu"].startswith("H100")
            machine = "a100" if not hopper else "h100" if row["kernel"].endswith("3") else "h100fa2"
            points.append(_flash(machine, row, length, dim))
        elif row["op"] in ("sdp_fwd", "sdp_bwd"):
            points.append(_fused(row))
    return points


def _flash(machine: str, row: dict[str, str], length: float, dim: float) -> MachinePoint:
    """The papers' protocol: 16k tokens in all, hidden size 2048; FLOPs halved if causal, backward 2.5x forward."""
    tokens, heads, causal = 16384.0, 2048.0 / dim, row["causal"] == "y"
    both = row["direction"] == "fwd+bwd"
    flops = 4 * tokens * length * 2048 * (0.5 if causal else 1.0) * (3.5 if both else 1.0)

    def predict(known: Machines) -> float:
        shape = (heads, heads, dim, dim, tokens * length, tokens, tokens, causal)
        seconds = attention_seconds(*shape, False, "bfloat16", known[machine])
        return seconds + attention_seconds(*shape, True, "bfloat16", known[machine]) if both else seconds

    return Point(f"{row['kernel']} {machine[:4]} {row['direction']}", flops / (float(row["tflops"]) * 1e12), predict)


def _fused(row: dict[str, str]) -> MachinePoint:
    """Its FLOPs count causal attention in full (they exceed the peak otherwise); its heads show wave quantization."""
    numbers = {key: float(value) for key, value in re.findall(r"(\w+)=(\d+)", row["shape"])}
    backward, length = row["op"] == "sdp_bwd", numbers["seq_len"]
    heads, dim, v_dim = numbers["head_num"], numbers["qk_head_dim"], numbers["v_head_dim"]
    flops = 2 * length**2 * heads * (dim + v_dim) * (2.5 if backward else 1.0)

    def predict(known: Machines) -> float:
        shape = (heads, numbers["kv_head_num"], dim, v_dim, length**2, length, length, True)
        return attention_seconds(*shape, backward, "bfloat16", known["a100pcie"])

    return Point(f"SimuMax {row['op']}", flops / (float(row["tflops"]) * 1e12), predict)


def with_attention(known: Machines, x: Sequence[float]) -> Machines:
    """x: fractions at 64, 128, 256: FA2 A100 forward, FA2 H100 forward, backward, FA3 forward; lengths, waves, ramp."""
    a100, fa2, fa2_back, fa3 = (dict(zip((64, 128, 256), x[i : i + 3])) for i in (0, 3, 6, 9))
    lengths = {"fa2": (x[12], x[13], x[18], x[14]), "fa3": (x[15], x[13], x[19], x[16])}
    fa3_back = {dim: FA3_BACKWARD_OVER_FA2 * value for dim, value in fa2_back.items()}
    a100_back = {dim: a100[dim] * fa2_back[dim] / fa2[dim] for dim in a100}
    out = {}
    for name, hw in known.items():
        ampere = name.startswith("a100")
        tables = {
            "fa2": (a100 if ampere else fa2, a100_back if ampere else fa2_back, "fa2"),
            "fa3": (fa3, fa3_back, "fa3"),
        }
        kernels = dict(hw.attention)
        for kernel in kernels.keys() & tables.keys():
            forward, backward, length = tables[kernel]
            kernels[kernel] = AttentionEfficiency(forward, backward, *lengths[length], x[17], MEASURED_ELEMENTS)
        out[name] = replace(hw, attention=kernels)
    return out


# Collectives ----------------------------------------------------------------------------------------------------------


def collective_points(smallest: float = 2e6) -> Points:
    points = []
    for row in rows("collectives.csv"):
        nbytes = float(row["msg_bytes"] or 0)
        machine, label = _fabric(row)
        kind, ranks, nodes = row["collective"], int(row["gpus"] or 0), int(row["nodes"] or 1)
        if machine is None or nbytes < smallest or not ranks or "back-to-back" in row["notes"]:
            continue
        if "Ring" in row["algo"] and kind == "all_reduce" and "NVLS" not in row["algo"].replace("NVLS off", ""):
            continue  # forced algorithms: the default is what runs
        factor = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}[kind]
        if row["time_us"]:
            seconds = float(row["time_us"]) * 1e-6
        elif row["algbw_GBps"]:
            seconds = nbytes / (float(row["algbw_GBps"]) * 1e9)
        else:
            seconds = factor * (ranks - 1) / ranks * nbytes / (float(row["busbw_GBps"]) * 1e9)
        points.append(_collective(label, kind, nbytes, ranks, nodes, machine, seconds))
    return points


def _collective(
    label: str, kind: str, nbytes: float, ranks: int, nodes: int, machine: str, seconds: float
) -> MachinePoint:
    local = ranks // nodes
    return Point(label, seconds, lambda known: collective_seconds(kind, nbytes, ranks, local, known[machine]))


def _fabric(row: dict[str, str]) -> tuple[str | None, str]:
    """(machine, source label); None for rows of an unknown machine or of other kernels than NCCL's."""
    source, gpu, nodes = row["source"], row["gpu"], row["nodes"]
    if source.startswith("ml-eng"):
        name = {"A100 (NVLink3)": "a100", "H200": "h200", "B200": "b200"}.get(gpu)
        return name, f"ml-engineering {name} x{row['gpus']}"
    if source.startswith("AWS"):
        if "EKS" in row["interconnect"] or gpu.startswith("A100"):
            return None, ""  # an old plugin (a third of the rate of newer rows); 4 x 100 Gb/s: other networks
        return "h100", "AWS h100 x16"
    if source.startswith("CoreWeave"):
        return "h100", "CoreWeave h100 x64"
    if source.startswith("vTrain"):
        return "a100", "vTrain a100"
    if source == "Hetu-Galvatron sp_time profile":
        return "a100", f"Galvatron {row['collective']}"  # GPU not stated; its large-message rates are the A100's
    return None, nodes


def with_collectives(known: Machines, x: Sequence[float]) -> Machines:
    """x: base us, hop us, ramp MB, power, ring A100, ring Hopper, nvls Hopper, a2a, inter hop us, ramp MB, fraction."""
    out = {}
    for name, hw in known.items():
        nvls = {"h100": x[6], "h200": x[6], "h800": x[6]}.get(name, hw.collective.nvls)
        collective = replace(
            hw.collective, base_seconds=x[0] * 1e-6, ramp_bytes=x[2] * 1e6, ramp_power=x[3],
            ring=x[4] if name.startswith("a100") else x[5], nvls=nvls, inter_ramp_bytes=x[9] * 1e6, inter=x[10],
            all_to_all_intra=x[7] if name.startswith("a100") else hw.collective.all_to_all_intra,
        )  # fmt: skip
        intra = Link(hw.intra_link.bytes_per_second, x[1] * 1e-6)
        inter = Link(hw.inter_link.bytes_per_second, x[8] * 1e-6)
        out[name] = replace(hw, collective=collective, intra_link=intra, inter_link=inter)
    return out


# Fit and report -------------------------------------------------------------------------------------------------------


def groups() -> list[Group[Machines]]:
    return [
        Group(
            "GEMM", gemm_points(), with_gemm,
            (0.93, 0.85, 0.8, 45), (0.7, 0.5, 0, 0), (1.0, 1.0, 2.0, 200),
        ),
        Group(
            "attention", attention_points(), with_attention,
            (0.68, 0.74, 0.7, 0.35, 0.41, 0.36, 0.31, 0.36, 0.33, 0.55, 0.72, 0.82)
            + (80, 150, 300, 180, 330, 1.2, 1.3, 1.5),
            (0.1,) * 12 + (0.0,) * 6 + (1.0, 1.0), (1.2,) * 12 + (2000.0,) * 5 + (5.0, 3.0, 3.0),
            sole=("Flash", "SimuMax"),
        ),
        Group(
            "collectives", collective_points(), with_collectives,
            (25, 1.5, 4, 0.6, 0.79, 0.81, 0.6, 0.66, 6, 16, 0.93),
            (10, 0.5, 0.01, 0.3, 0.6, 0.6, 0.4, 0.4, 3, 0.1, 0.8), (30, 3, 100, 1.0, 1, 1, 0.8, 1, 6, 200, 0.97),
            sole=("Galvatron all_to_all", "ml-engineering h200 x8"),
        ),
    ]  # fmt: skip


def _row(label: str, errors: Sequence[float], held: Sequence[float] | None) -> str:
    def cells(values: Sequence[float]) -> str:
        found = errors_of(label, values)
        return f"{found.median:7.1%} {found.p90:7.1%} {found.bias:+7.1%}"

    return f"  {label:34s} {len(errors):4d}  {cells(errors)}" + (f"   {cells(held)}" if held is not None else "")


def report(group: Group[Machines], known: Machines, held_out: dict[str, list[float]]) -> None:
    print(f"\n{group.name}: error of predicted time: median, 90th percentile, median with sign; the same held out")
    for source in dict.fromkeys(point.source for point in group.points):
        errors = [point.error(known) for point in group.points if point.source == source]
        print(_row(source, errors, held_out.get(source)))
    held = [error for errors in held_out.values() for error in errors]
    print(_row("all", [point.error(known) for point in group.points], held or None))


def write(known: Machines) -> None:
    """Replace the fitted numbers in the hardware files, leaving comments and everything else as they are."""
    for name in ("a100", "h100", "h200", "h800", "b200"):
        path, hw = YAML / f"{name}.yaml", known[name]
        values = {"intra_link": hw.intra_link.latency_seconds, "inter_link": hw.inter_link.latency_seconds}
        for part in (hw.gemm, hw.collective):
            values.update({key: value for key, value in vars(part).items() if isinstance(value, float)})
        text = path.read_text()
        for key, value in values.items():
            text = _set(text, rf"{key}: .*latency_seconds: |  {key}: ", number_text(value))
        for dtype, value in hw.gemm.max_fraction.items():
            text = _set(text, f"    {dtype}: ", number_text(value))
        for kernel, constants in hw.attention.items():
            head, mark, tail = text.partition(f"\n  {kernel}:")
            block, end, rest = re.split(r"(\n(?: {0,2})\S)", tail, maxsplit=1)
            for key, value in vars(constants).items():
                block = _set(block, f"    {key}: ", number_text(value) if isinstance(value, float) else _table(value))
            text = head + mark + block + end + rest
        path.write_text(text)


def _set(text: str, before: str, value: str) -> str:
    """Replace the number or {table} after each `before` that begins a line."""
    return re.sub(rf"(?m)^({before})(?:[-+.e\d]+|{{.*}})", rf"\g<1>{value}", text)


def _table(values: Mapping[int, float]) -> str:
    return "{" + ", ".join(f"{key}: {number_text(value)}" for key, value in values.items()) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="no fit: errors of the hardware files as they are")
    parser.add_argument("--no-hold-out", action="store_true", help="skip the cross-validation")
    parser.add_argument("--write", action="store_true", help="put the fitted constants into the hardware files")
    arguments = parser.parse_args()
    known = machines()
    for group in groups():
        held: dict[str, list[float]] = {}
        if not arguments.check:
            x = group.fit(known)
            held = {} if arguments.no_hold_out else group.held_out(known)
            known = group.apply(known, x)
            print(f"\n{group.name}: {(group.apply.__doc__ or '').strip()}\n  {[float(f'{v:.4g}') for v in x]}")
        report(group, known, held)
    if arguments.write:
        write(known)


if __name__ == "__main__":
    main()
