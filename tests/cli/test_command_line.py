"""The command line as a process: help, inspect, doctor, and what is imported when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from omnicompile.cli.main import COMMANDS


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help(run: Any, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 0
    assert "omnicompile" in outcome.out
    if arguments[-1] == "--help":
        assert "examples:" in outcome.out


def test_help_and_argument_errors_import_no_torch() -> None:
    code = (
        "import sys; from omnicompile.cli.main import main\n"
        "assert main(['plan', '--help']) == 0 and main(['plan', 'x.py', '--gpus', 'x']) == 2\n"
        "assert main(['plan', 'x.py', '--gpus', '0']) == 2 and main(['plan', 'x.py', '--gpus', '8']) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, omnicompile; assert callable(omnicompile.plan) and omnicompile.load_recipe\n"
        "from omnicompile.plan import Plan; assert callable(omnicompile.plan) and omnicompile.Plan is Plan\n"
        "assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_of_the_package() -> None:
    import omnicompile

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vars(omnicompile)["__getattr__"]("nothing")


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "omnicompile", "plan"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: MODEL (see omnicompile plan --help)\n"


def test_a_reader_that_stops_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "omnicompile", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_terminal_without_unicode(model: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "omnicompile", "doctor"], capture_output=True, env=environment)
    assert done.returncode == 0


def test_no_command_and_an_unknown_one(run: Any) -> None:
    assert run().code == 2
    outcome = run("plann")
    assert outcome.code == 2
    assert "invalid choice: 'plann'" in outcome.err


def test_inspect(run: Any, asked: Any, model: str) -> None:
    outcome = run("inspect", model, "--seq-len", "99")
    assert outcome.code == 0
    assert "text.layers" in outcome.out
    assert asked.arguments["workload"].seq_len == 99
    view = json.loads(run("inspect", model, "--json").out)
    assert view["parameters"] == 6200


def test_inspect_of_a_missing_file(run: Any, asked: Any) -> None:
    outcome = run("inspect", "missing.py")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_doctor(run: Any) -> None:
    outcome = run("doctor")
    assert outcome.code == 0
    assert "torch" in outcome.out and "planning works here" in outcome.out
    view = json.loads(run("doctor", "--json").out)
    assert view["usable"] is True
    assert {check["name"] for check in view["checks"]} >= {"python", "torch", "GPU", "gloo", "step, eager"}
    assert {check["area"] for check in view["checks"]} == {"plan", "train", "backends", "kernels"}
    kernels = {check["name"]: check["detail"] for check in view["checks"] if check["area"] == "kernels"}
    assert kernels["attention"].startswith("torch_cpu") and kernels["rms_norm"].startswith("inductor")


def test_doctor_checks_a_choice_of_kernels(run: Any) -> None:
    text = " ".join(run("doctor", "--kernels", "rms_norm=reference").out.split())
    assert "reference; also available: inductor" in text
    for choice, cause in (
        ("rms_norm=ligr", "did you mean liger"),
        ("attention=flash_attn3", "cannot be used here: it runs on sm90, and this is cpu"),
    ):
        outcome = run("doctor", "--kernels", choice)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1) and cause in outcome.err


def test_doctor_names_what_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnicompile.cli import doctor

    found = doctor.installed
    monkeypatch.setattr(
        doctor,
        "installed",
        lambda name: {"torch": "2.9.1", "scipy": None, "transformers": "4.57.1"}.get(name, found(name)),
    )
    outcome = run("doctor")
    assert outcome.code == 2
    text = " ".join(outcome.out.split())  # lines are wrapped to the terminal
    assert "2.9.1: install torch 2.11 to 2.13" in text
    assert "pip install scipy" in text
    assert "4.57.1: install transformers 5.20 to 5.99" in text
    assert "planning does not work here" in outcome.out


def test_doctor_names_what_to_install_for_compiling(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnicompile.cli import doctor

    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    outcome = run("doctor")
    assert outcome.code == 0
    assert "no C++ compiler: install g++" in outcome.out
