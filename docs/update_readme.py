"""Runs the README's plan command and puts what it gives into the README: its output, and a picture of its page where
Chromium is installed. `python docs/update_readme.py`, from anywhere."""

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
PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTH = 1160


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:  # a capture of an older version must not be shown
        page = Path(cache) / "report.html"
        output = planned(cache)
        planned(cache, "--html", str(page))
        picture(page, Path(cache) / "profile")
    readme = ROOT / "README.md"
    block = f"<!-- plan-output -->\n```text\n{output.strip()}\n```\n<!-- /plan-output -->"
    text, count = BLOCK.subn(lambda match: block, readme.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{readme}: expected one plan-output block, found {count}")
    readme.write_text(text, encoding="utf-8")


def planned(cache: str, *options: str) -> str:
    """What the command prints."""
    environment = os.environ | {"COLUMNS": "100", "OMNICOMPILE_CACHE": cache}
    command = [sys.executable, "-m", "omnicompile", *COMMAND, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def picture(page: Path, profile: Path) -> None:
    """The page down to its memory section, as it stands in the README."""
    sys.path.insert(0, str(ROOT))
    from tests.report.chromium import PROGRAM, browser

    if PROGRAM is None:
        print(f"{PICTURE} is left as it is: Chromium is not installed", file=sys.stderr)
        return
    with browser(profile) as shown:
        shown.open(page, WIDTH)
        end = shown.value("document.getElementById('memory-section').getBoundingClientRect().bottom")
        PICTURE.parent.mkdir(exist_ok=True)
        shown.screenshot(PICTURE, WIDTH, round(end) + 20)


if __name__ == "__main__":
    main()
