"""The page of promises: every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_is_named_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 50
    for file, name in named:
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
        assert not name or name in functions, f"{file}::{name}"


def test_every_fault_is_in_the_table():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    for node in ast.parse((ROOT / "tests" / "test_faults.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert f"`tests/test_faults.py::{node.name}`" in page, node.name
