"""Every option of every command with values that it cannot have: one sentence, in the option's own name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ensembler.cli import COMMANDS, app
from ensembler.config import commands
from ensembler.errors import UsageError
from ensembler.options import Options
from ensembler.trainers.method import methods
from ensembler.typed import sentence

BAD = ("many", "-1", "nan", "2.5", "", "s3://bucket/name")
FOREIGN = re.compile(
    r"Input should|Value error|valid (integer|number|float)|not one of|Invalid value|in the range|parse"
)
UsageMistake = typer.BadParameter.__base__


ALL = dict(commands(typer.main.get_command(app)))


def parsed(words: str, *arguments: str) -> str | dict[str, Any]:
    """What a command would be called with, or what is wrong with it."""
    command = ALL[words]
    needed = [parameter for parameter in command.params if parameter.required]
    given = [f"{one.opts[0]}=x" for one in needed if one.param_type_name == "option"]
    choices = {"data download": "cifar10c"}
    given += [choices.get(words, "x") for one in needed if one.param_type_name == "argument"]
    try:
        return command.make_context(f"ensembler {words}", [*given, *arguments]).params
    except UsageMistake as error:
        return sentence(error)


@pytest.mark.parametrize("words", ALL)
def test_every_option_refuses_what_it_cannot_be_in_its_own_name(words):
    assert isinstance(parsed(words), dict), parsed(words)
    for option in ALL[words].params:
        if option.param_type_name != "option" or option.name in ("help", "config"):
            continue
        flag = max(option.opts, key=len)
        if getattr(option, "is_flag", False):
            assert parsed(words, f"{flag}=maybe") == f"{flag} takes no value"
            continue
        assert str(parsed(words, flag)).startswith(f"{flag} takes a value")
        for bad in BAD:
            found = parsed(words, f"{flag}={bad}")
            if isinstance(found, str):
                assert re.match(rf"{flag} (must be|takes) ", found), found
                assert not FOREIGN.search(found) and "\n" not in found


@pytest.mark.parametrize("words", ALL)
def test_help_splits_no_name_on_a_terminal_of_80_columns(words):
    written = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [*words.split(), "--help"]).stdout
    assert "<bool>" not in written
    for option in ALL[words].params:
        for name in [*option.opts, *option.secondary_opts] if option.param_type_name == "option" else []:
            assert re.search(rf"{name}\b", written), name
        for word in (option.metavar or "").split():
            assert f" {word.strip('[]')}" in written.replace("[", " ").replace("]", " "), option.name


@pytest.mark.parametrize("words", ALL)
def test_every_place_that_a_result_goes_to_takes_a_url_or_refuses_it(words):
    """A ``Path`` made of a URL would be a local folder called ``s3:``."""
    for option in ALL[words].params:
        if option.param_type_name == "option" and not getattr(option, "is_flag", False):
            found = parsed(words, f"{max(option.opts, key=len)}=memory://place/name")
            if isinstance(found, dict):
                values = found[option.name]
                for value in values if isinstance(values, list | tuple) else [values]:
                    assert not isinstance(value, Path), (words, option.name)
                    assert str(value) == "memory://place/name"


def records() -> list[type[Options]]:
    modules = [
        importlib.import_module(f"ensembler.{name.rpartition('.')[0]}.options") for name in ("eval.x", "study.x")
    ]
    modules += [importlib.import_module(f"ensembler.{name}") for name in (*COMMANDS, "study.file", "trainers.launch")]
    found = [value for module in modules for _, value in inspect.getmembers(module, inspect.isclass)]
    return [*{one for one in [*found, *methods()] if issubclass(one, Options) and one.model_fields}]


def test_every_field_of_every_record_refuses_what_it_cannot_be_in_its_own_name():
    kinds = sorted(records(), key=lambda kind: kind.__name__)
    assert len(kinds) > 15
    refused = 0
    for kind in kinds:
        flags = kind.flags()
        for name in kind.model_fields:
            for bad in (*BAD, -1, 2.5, float("nan"), None, [], {}, object()):
                try:
                    kind.typed({name: bad})
                except UsageError as error:
                    said = str(error)
                    assert not FOREIGN.search(said), said
                    other = [flag for each, flag in flags.items() if each != name]
                    own = said.removeprefix("each ").startswith(f"{flags[name]} must be ")
                    missing = said.endswith(" is required") and said.removesuffix(" is required") in other
                    assert own or missing, (kind, name, bad, said)
                    refused += own
    assert refused > 300


def test_what_is_typed_wrong_is_one_line_and_the_exit_code_2():
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        return line

    assert refused("serve", "x", "--workers", "0") == "error: --workers must be at least 1, not 0"
    assert refused("predict", "a", "b", "--mode", "slow") == (
        "error: --mode must be full or exact or confidence, not 'slow'"
    )
    assert refused("eval", "--out", "s3://bucket/report").startswith(
        "error: --out takes a path on this machine, not a URL (s3://bucket/report)"
    )
    assert refused("serve") == "error: BUNDLE is missing: see ensembler serve --help"
    assert refused("eval", "") == "error: RUNS takes a path or a URL, and it is empty"
    assert refused("push") == "error: URL is missing: see ensembler push --help"
    assert "has no option --memb: did you mean --members?" in refused("serve", "x", "--memb", "3")
    assert refused("evl").startswith("error: there is no command 'evl'")
    assert "leave out b c" in refused("show", "a", "b", "c")
    assert not Path("s3:").exists()


def test_help_names_arguments_as_errors_do_and_no_option_that_there_is_not():
    for name, command in ALL.items():
        usage = command.get_usage(command.context_class(command, info_name=name))
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                assert parameter.metavar == parameter.metavar.upper() or "." in parameter.metavar
                assert parameter.metavar in usage and "[[" not in usage
            text = re.sub(r"ensembler \w+ --[\w-]+", "", parameter.help or "")  # of another command, by its name
            assert set(re.findall(r"--[a-z0-9][\w-]*", text)) <= options, (name, parameter.name)
