"""`omnicompile calibrate`: measures this machine and writes the hardware file that `--gpu` takes."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnicompile.cli.progress import color_wanted, emit
from omnicompile.errors import InputError

if TYPE_CHECKING:
    from omnicompile.cost_model.calibration_fit import Fit
    from omnicompile.cost_model.hardware import Hardware
    from omnicompile.cost_model.measurements import Measurements

HELP = "measure this machine and write a hardware file for --gpu"
EXAMPLES = """\
examples:
  omnicompile calibrate --out my.yaml
      GEMMs, attention, memory and collectives of all GPUs of this machine; without a GPU of two processes on its CPU
  omnicompile plan model.py --gpus 8 --gpu my.yaml
  omnicompile calibrate --quick
      fewer shapes, less exact
  OMP_NUM_THREADS=4 omnicompile calibrate --nproc 2
      a CPU: two ranks of four threads
  torchrun --nnodes 2 --nproc-per-node 8 ... -m omnicompile calibrate --out my.yaml
      across nodes too; the first rank writes the file

Nothing else should be at work on the machine meanwhile.
"""
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", type=Path, help="the file to write (default: NAME.yaml)")
    parser.add_argument(
        "--name", metavar="NAME", default="", help="what the hardware is called (default: the device's)"
    )
    parser.add_argument("--nproc", metavar="N", type=int, help="ranks (default: one for each GPU; 2 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    parser.add_argument("--json", action="store_true", help="print JSON for programs, with everything measured")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from omnicompile.calibration.processes import calibrate
    from omnicompile.cost_model.calibration_fit import fit_hardware

    measured = calibrate(args.nproc, args.quick, args.name, quiet=args.json)
    if measured is None:  # another rank of torchrun
        return 0
    base = _known(measured)
    fit = fit_hardware(measured, base)
    path = args.out or Path(f"{fit.hardware.name}.yaml")
    _write(path, fit, measured, base)
    emit(json.dumps(_as_json(path, fit, measured), indent=2) if args.json else _text(path, fit, measured))
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be wrong is found before anything is measured."""
    if args.name and not NAME.fullmatch(args.name):
        raise InputError(f"--name may hold letters, digits, '.', '_' and '-', got {args.name!r}")
    if args.out is not None and args.out.suffix not in SUFFIXES:
        raise InputError(f"--out must end with .yaml, or --gpu would not take it as a file: got {args.out}")
    folder = (args.out or Path()).parent
    if not folder.is_dir():
        raise InputError(f"--out: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (args.out is not None and args.out.is_dir()):
        raise InputError(f"--out: cannot write {args.out or folder}")
    if args.nproc is not None and args.nproc < 1:
        raise InputError(f"--nproc must be at least 1, got {args.nproc}")


def _known(measured: Measurements) -> Hardware | None:
    """The hardware file of this GPU model, if there is one."""
    from omnicompile.cost_model.hardware import load_hardware

    if measured.machine.device == "cpu":
        return None
    try:
        return load_hardware(measured.machine.model)
    except InputError:
        return None


def _write(path: Path, fit: Fit, measured: Measurements, base: Hardware | None) -> None:
    from omnicompile.cost_model.calibration_notes import comments, head_lines
    from omnicompile.cost_model.hardware import load_hardware
    from omnicompile.cost_model.hardware_text import hardware_text
    from omnicompile.whole_file import write_whole

    try:
        write_whole(path, hardware_text(fit.hardware, comments(measured, base), head_lines(measured)))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    load_hardware(str(path))


def _as_json(path: Path, fit: Fit, measured: Measurements) -> dict[str, Any]:
    return {
        "file": str(path),
        "hardware": asdict(fit.hardware),
        "errors": [{"group": name} | asdict(errors) for name, found in fit.groups for errors in found],
        "measured": asdict(measured),
    }


def _text(path: Path, fit: Fit, measured: Measurements) -> str:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from omnicompile.report.terminal import render
    from omnicompile.report.units import percent

    table = Table.grid(padding=(0, 2))
    for column in range(6):
        table.add_column(justify="left" if column < 2 else "right")
    table.add_row("", "", *(Text(title, "bold") for title in ("shapes", "median", "90th", "bias")))
    for name, found in fit.groups:
        for index, errors in enumerate(found):
            sign = "+" if errors.bias >= 0 else "-"
            cells = (percent(errors.median), percent(errors.p90), sign + percent(abs(errors.bias)))
            table.add_row(Text(name if index == 0 else "", "bold cyan"), errors.source, str(errors.points), *cells)
    notes = [Text(f"note: {note}") for note in measured.notes]
    title = Text(f"{measured.machine.description}: time by the fitted formulas against measured time", "bold")
    last = Text(f"\nwrote {path}: omnicompile plan MODEL --gpus {measured.machine.ranks} --gpu {path}")
    return render(Group(title, Text(), table, Text(), *_rates(fit.hardware), *notes, last), color=color_wanted())


def _rates(hw: Hardware) -> list[Any]:
    from rich.text import Text

    from omnicompile.report.units import flops_text

    rates = [f"{dtype} {flops_text(rate * hw.gemm.max_fraction[dtype])}/s" for dtype, rate in hw.peak_flops.items()]
    lines = [f"GEMM         {', '.join(rates)}"]
    lines += [f"memory       {hw.memory_bandwidth * hw.memory_fraction / 1e9:.3g} GB/s"]
    link = hw.collective.ring * hw.intra_link.bytes_per_second / 1e9
    lines += [f"collectives  {link:.3g} GB/s over a link, {hw.collective.base_seconds * 1e6:.3g} us each"]
    lines += [f"contention   compute takes {hw.contention_factor:.0%} of a collective's time longer beside it"]
    return [Text(line) for line in lines]
