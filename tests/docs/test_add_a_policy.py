"""The walk-through in docs/add-a-policy.md, followed to the letter in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "multirun", "build")
FILE = re.compile(r"^`([^`\n]+)`\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"## 4\..*?```sh\n(.*?)```", re.DOTALL)


def test_walk_through(tmp_path: Path) -> None:
    """Its three files and three commands work as they stand."""
    page = (CHECKOUT / "docs" / "add-a-policy.md").read_text()
    copy = tmp_path / "checkout"
    shutil.copytree(CHECKOUT, copy, ignore=LEFT_OUT)
    files = FILE.findall(page)
    assert [path.partition("/")[0] for path, _ in files] == ["policies", "conf", "tests"]
    for path, text in files:
        (copy / path).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "2 passed" in call("-m", "pytest", "-q", "-n0", "tests/policies/test_two_choices.py")
    found = COMMANDS.search(page)
    assert found is not None
    commands = [line.split() for line in found.group(1).splitlines()]
    assert [words[:2] for words in commands] == [["deepflow", "run"], ["deepflow", "run"], ["deepflow", "sweep"]]
    for _, *arguments in commands:
        printed = call("-m", "experiments.cli", *arguments, "progress=false")
        assert (copy / printed.splitlines()[-1] / "report.html").is_file()
