"""Arguments of public functions: each one of another type is one sentence, which names it."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import ensembler
from ensembler import Ensemble, Run, as_dataset, load_dataset
from ensembler.arguments import checked
from ensembler.errors import UsageError
from ensembler.eval import compare, evaluate
from ensembler.trainers import FGE, DeepEnsemble, Settings, collapse_run, combine, import_checkpoints, train

ROWS = (np.ones((9, 2)), np.arange(9) % 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: train("digits", DeepEnsemble), "method must be a Method, not the class DeepEnsemble"),
        (lambda: train("digits", "fge"), "method must be a Method, not 'fge'"),
        (lambda: train("digits", FGE(), {"epochs": 1}), "settings must be a Settings, not {'epochs': 1}"),
        (lambda: train("digits", FGE(), on_event=5), "on_event must be a function, not 5"),
        (lambda: train("digits", FGE(), engine="local"), "engine must be an Engine, not 'local'"),
        (lambda: train("digits", FGE(), quiet="no"), "quiet must be true or false, not 'no'"),
        (lambda: combine([]), r"runs must be a mapping of text to a Run, not \[\]"),
        (
            lambda: combine({"a": "runs/a", "b": "runs/b"}),
            "runs must be a mapping of text to a Run, not ",
        ),
        (lambda: import_checkpoints([{"w": 1}], "cnn", "digits"), r"files must be text or .*, not \[{'w': 1}\]"),
        (lambda: collapse_run("runs/x", "digits"), "run must be a Run, not 'runs/x'"),
        (lambda: import_checkpoints(None, "cnn", "digits"), "files must be text or a path or a list of .*, not None"),
        (lambda: compare([]), "predictions must be a mapping of text to an array or a mapping of text to an array"),
        (lambda: evaluate(None), "predictions must be an array or a mapping of text to an array, not None"),
        (lambda: as_dataset(ROWS, name=5), "name must be text, not 5"),
        (lambda: as_dataset(ROWS, image_size="8"), "image_size must be a whole number, not '8'"),
        (lambda: as_dataset(ROWS, image_size=8.5), "image_size must be a whole number, not 8.5"),
        (lambda: as_dataset(ROWS, image_size=True), "image_size must be a whole number, not True"),
        (lambda: as_dataset(ROWS, validation_share="0.1"), "validation_share must be a number, not '0.1'"),
        (lambda: as_dataset(ROWS, normalisation=((0.5,), (0.5,))), "normalisation must be text, not "),
        (lambda: as_dataset(ROWS, in_memory="no"), "in_memory must be true or false, not 'no'"),
        (lambda: load_dataset(5), "name must be text, not 5"),
        (lambda: Ensemble("runs/x"), "run must be a Run, not 'runs/x'"),
        (lambda: Ensemble.load(None), "path must be text or a path, not None"),
        (lambda: Run.load(torch.ones(1000)), "path must be text or a path, not an object of type Tensor"),
    ],
)
def test_an_argument_of_another_type_is_one_sentence(call, sentence):
    with pytest.raises(UsageError, match=f"^{sentence}") as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers():
    @checked
    def f(i: int, x: float, yes: bool, path: str | Path | None = None, names: NoSuchName | None = None) -> tuple:  # noqa: F821
        return i, x, yes, path, names

    given = np.int64(3), np.float32(2), np.bool_(True)
    assert f(*given) == (*given, None, None)
    assert f(1, 2, yes=False, path=Path("x"), names=[7]) == (1, 2, False, Path("x"), [7])
    with pytest.raises(TypeError, match=r"f\(\) missing 1 required positional argument: 'yes'"):
        f(1, 2.0)
    with pytest.raises(UsageError, match="path must be text or a path, not 7"):
        f(1, 2.0, True, 7)


def test_what_an_option_was_given_is_said_in_a_few_words():
    weights = torch.nn.Linear(100, 100)
    with pytest.raises(UsageError, match=r"^init must be text, not an object of type OrderedDict$"):
        Settings(init=weights.state_dict())
    with pytest.raises(UsageError, match=r"^optimiser must be text, not an object of type SGD$"):
        Settings(optimiser=torch.optim.SGD(weights.parameters(), lr=1))
    assert Settings(device=torch.device("cpu")) == Settings(device="cpu")


@pytest.mark.parametrize("package", ["ensembler", "ensembler.trainers", "ensembler.eval", "ensembler.serve"])
def test_every_public_function_is_checked(package):
    """But those that take arrays alone, whose own checks say more."""
    module = import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    unchecked = {name for name, value in functions.items() if not hasattr(value, "__wrapped__")}
    assert unchecked <= {"corrupt", "scores"}
    assert package != "ensembler" or ensembler.as_dataset in functions.values()
