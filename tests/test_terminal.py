"""What is on the screen of a real terminal when a command has ended."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pty", reason="there are no pseudo-terminals")

from tests._runs import make_bundle
from tests._service import tiny_images
from tests._terminal import screen

TRAIN = ["--arch", "tests._small:network", "--image-size", "8", "--epochs", "1", "--device", "cpu"]


ROOT = Path(__file__).parents[1]


def ensembler(*arguments, columns, cwd=ROOT):
    return screen([sys.executable, "-m", "ensembler", *map(str, arguments)], columns, cwd)


@pytest.mark.parametrize("columns", [80, 120])
def test_every_seeds_result_stands_at_the_end(columns, tmp_path):
    given = "--vertices", 2, "--seeds", 2, *TRAIN, "--out", tmp_path / "run"
    found = ensembler("train-simplex", *given, columns=columns)
    results = [line for line in found if line.startswith(("test:", "cost:", "run:"))]
    assert [line.partition(":")[0] for line in results] == ["test", "cost", "run"] * 2
    assert found[-1].startswith("run:") or found[-2].startswith("run:")  # a long path takes two lines
    parts = [line.partition(":")[0] for line in found if " epoch, loss" in line]
    assert parts == [f"seed {seed}, {part}" for seed in (0, 1) for part in ("solution 1", "vertex 2")]
    assert not any("━" in line for line in found)  # no bar is left


def test_help_breaks_no_choice_and_names_no_type_of_a_switch():
    lines = ensembler("train-fge", "--help", columns=80)
    assert "float32 | tf32" in " ".join(lines)
    assert not any("<bool>" in line for line in lines if "--help" not in line)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_prediction_is_one_line_of_the_terminal(columns, tmp_path):
    folder = tmp_path / "a folder of a very long name" / "and another one below it" / "and a third"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(tiny_images(3)):
        Image.fromarray(pixels).save(folder / f"picture {number}.png")
    found = ensembler("predict", make_bundle(tmp_path / "bundle"), folder, columns=columns)
    assert found[0].split() == ["image", "class", "probability", "uncertainty", "abstains"]
    assert len(found) == 4  # 3 images
    for number, line in enumerate(found[1:]):
        path, label, *figures, abstains = re.split(r" {2,}", line)
        assert path.startswith("…") and path.endswith(f"picture {number}.png")
        assert label.startswith("class ") and abstains == "-"
        assert all(0 <= float(figure) < 2 for figure in figures) and len(figures) == 2


def test_an_error_breaks_between_words_and_a_path_never(tmp_path):
    given = "train-mc-dropout", "--arch", "tests._small:network", "--image-size", 8, "--out", tmp_path / "run"
    error = ensembler(*given, columns=80)
    assert len(error) > 1 and all(len(line) <= 80 for line in error)
    assert " ".join(error).startswith("error: tests._small:network has no dropout")
    assert " ".join(error).endswith("choose an --arch with dropout, such as vgg16")
    lost = tmp_path / ("a-folder-of-a-long-name-" * 4)
    joined = "".join(ensembler("show", lost, columns=80))
    assert str(lost) in joined
