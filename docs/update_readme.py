"""Runs the README's plan command and puts its output into the README. `python docs/update_readme.py`, from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- plan-output -->\n.*?<!-- /plan-output -->", re.DOTALL)
COMMAND = ("plan", "examples/qwen2_vl_72b.py", "--gpus", "128")


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:  # a capture of an older version must not be shown
        environment = os.environ | {"COLUMNS": "100", "OMNICOMPILE_CACHE": cache}
        command = [sys.executable, "-m", "omnicompile", *COMMAND]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    readme = ROOT / "README.md"
    block = f"<!-- plan-output -->\n```text\n{done.stdout.strip()}\n```\n<!-- /plan-output -->"
    text, count = BLOCK.subn(lambda match: block, readme.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{readme}: expected one plan-output block, found {count}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
