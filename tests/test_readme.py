"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from ensembler.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["probabilities"].shape == (8, 10)
    assert names["doubt"].disagreement.shape == (8,)
    assert names["more"].members == 25


def test_every_command_and_option_named_exists():
    lines = re.findall(r"^\$ (ensembler .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    commands = [part for line in lines for part in line.split(" && ")]
    assert len(commands) >= 4
    for line in commands:
        command, *arguments = shlex.split(line)[1:]
        help_text = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
        assert help_text.exit_code == 0, line
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert option in help_text.output, line
