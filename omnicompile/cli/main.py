"""The `omnicompile` command: finds the subcommand, turns errors into one line and an exit code.

Exit codes: 0 done, 1 a bug in OmniCompile, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import NoReturn, Protocol

from omnicompile.errors import OmniCompileError

# A command is one module with `HELP`, `EXAMPLES`, `add_arguments` and `run`, and one name here.
COMMANDS = (
    "plan", "simulate", "explain", "compare", "inspect", "show", "verify", "recipes", "export", "train",
    "calibrate", "doctor",
)  # fmt: skip
DESCRIPTION = "Plan, inspect and run distributed training of unmodified PyTorch models, omni-modal ones above all."
EPILOG = """\
examples:
  omnicompile plan model.py --gpus 128                         the fastest plan that fits on 128 H100s
  omnicompile plan config.json --gpus 8 --seq-len 32768        a Hugging Face model, long context
  omnicompile simulate model.py --gpus 128 --layout sp=4       what one given layout would take
  omnicompile explain model.py --gpus 128 --why-not sp=8       what another choice would cost, and where
  omnicompile compare a.yaml b.yaml                            two recipes: what differs, and what it costs
  omnicompile inspect model.py                                 parameters, FLOPs and activations per layer
  omnicompile verify model.py --gpus 8                         prove that the distributed model equals the original
  omnicompile show model.py --gpus 8 --tiny                    the rewritten program, with its collectives
  omnicompile recipes                                          plans for published models, ready to copy
  omnicompile export recipe.yaml --to veomni                   a plan as another framework's configuration
  omnicompile train recipe.yaml --data train.jsonl --out run   train on the processes that the recipe is for
  omnicompile calibrate --out my.yaml                          measure this machine, for --gpu my.yaml
  omnicompile doctor                                           what this machine and installation can do

`omnicompile COMMAND --help` shows a command's options, with examples.
"""


class Command(Protocol):
    """What a command module holds."""

    HELP: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = _parser().parse_args(arguments, argparse.Namespace(command_line=arguments))
        command: Command = import_module(f"omnicompile.cli.{args.command}")  # type: ignore[assignment]
        with _without_collector(), nullcontext() if debug else _libraries_quiet():
            return command.run(args)
    except SystemExit as stop:  # argparse: --help, or an argument error
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OmniCompileError as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {_one_line(error)}"
        print(f"internal error: {what} (run with --debug for the traceback)", file=sys.stderr)
        return 1


@contextmanager
def _without_collector() -> Iterator[None]:
    """A command ends before its garbage matters, and looking for it takes an eighth of the time of a plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands; their modules import what they need only when they run."""
    parser = _Parser(
        prog="omnicompile",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"omnicompile {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command: Command = import_module(f"omnicompile.cli.{name}")  # type: ignore[assignment]
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Without the warnings of torch and transformers about how they were called."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def version() -> str:
    """Of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("omnicompile")
    except PackageNotFoundError:
        return "(not installed)"
