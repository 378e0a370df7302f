"""The model card: what the manifest says is on it, what it does not say is said to be unknown, and the Hub reads it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from ensembler.run import Cost, CostEntry
from ensembler.storage import artefact
from ensembler.storage.card import card
from tests._runs import make_bundle, make_run


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / artefact.MANIFEST).read_text())


@pytest.fixture
def run(tmp_path):
    manifest = manifest_of(make_run(tmp_path / "run"))
    score = {"accuracy": 0.9125, "nll": 0.34567, "member_accuracy": 0.9, "disagreement": 0.0321}
    manifest["metrics"] = {"test": score | {"examples": 1234}, "validation": score | {"examples": 56}, "path": {"x": 1}}
    manifest["versions"] = {"python": "3.11.7", "torch": "2.15.0"}
    manifest["cost"] |= {"peak_memory": 3 * 2**29, "forward_passes": 77}
    return manifest


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.fullmatch(r"---\n(.*?)\n---\n.*", text, re.DOTALL)[1])


def rows(text: str) -> dict[str, list[str]]:
    """Every table row by its first cell; a cell's own bars are escaped."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_a_run_in_words(run):
    text = card(run, "ab" * 32, "hf://user/mine", "mine")
    found = rows(text)
    assert found["method"] == ["spro-simplex"]
    assert found["members, M"] == ["3, each one forward pass per prediction"]
    assert found["vertices, K"] == ["3"]
    assert found["images"] == [f"{' x '.join(map(str, run['dataset']['shape']))} (height, width, channels), uint8"]
    assert found["network"] == [f"cnn, {run['parameters']:,} parameters"]
    assert found["dataset"] == ["made by hand"]
    assert found["classes"] == ["5: class 0, class 1, class 2, class 3, class 4"]
    assert found["training cost"] == [
        "1,000 example passes (one image, forward and backward), 77 images forward only, 1 s, 1.50 GiB of peak memory"
    ]
    assert found["seed"] == ["0"]
    assert found["versions"] == ["python 3.11.7, torch 2.15.0"]
    assert found["test"] == ["1,234", "91.25", "0.3457", "90.00", "0.0321"]
    assert found["validation"][0] == "56"
    assert found["SHA-256 of the manifest"] == [f"`{'ab' * 32}`"]
    assert {name: found[f"`{name}`"] for name in run["files"]} == {n: [f"`{h}`"] for n, h in run["files"].items()}
    for line in (
        "pip install 'ensembler[hub]'",
        "ensembler pull hf://user/mine --out runs/mine",
        "ensembler eval runs/mine",
    ):
        assert line in text.splitlines()
    assert "Not calibrated" in text
    assert "Not calibrated" not in card(run, "ab" * 32, "hf://user/mine", "mine", calibrated=True)


def test_a_bundle_in_words(tmp_path):
    manifest = manifest_of(make_bundle(tmp_path / "bundle"))
    manifest["training_cost"] = {
        "example_passes": 5000,
        "device": "an H100",
        "entries": {"a": {"origin": "weights.pt"}},
    }
    manifest["validation"] = {"examples": 99, "accuracy": 0.5, "nll": 0.7}
    text = card(manifest, "cd" * 32, "s3://bucket/b", "b")
    found = rows(text)
    own = "5,000 example passes (one image, forward and backward)"
    assert found["training cost"] == [f"{own}, and the unknown cost of weights.pt"]
    assert found["trained on"] == ["an H100"]
    assert found["agreement with PyTorch"] == ["within 0.0e+00 in any probability"]
    assert found["validation, as exported"] == ["99", "50.00", "0.7000", "not recorded", "not recorded"]
    assert "seed" not in found
    assert "The training cost of weights.pt." in text
    assert "pip install 'ensembler[s3]'" in text
    assert "ensembler pull s3://bucket/b --out bundles/b" in text
    assert "model-index" not in front_matter(text)


def test_what_is_not_known_is_said(run):
    for split in ("test", "validation"):
        del run["metrics"][split]["examples"]
        run["metrics"][split]["disagreement"] = None  # of one member
    run["versions"] = {}
    found = rows(text := card(run, "ab" * 32, "file:///x/mine", "mine"))
    assert found["test"] == ["not recorded", "91.25", "0.3457", "90.00", "not recorded"]
    assert found["versions"] == ["not recorded"]
    assert "The number of images that the scores were measured on" in text
    assert "The licence of the weights" in text
    run["metrics"] = {}
    assert "No score is recorded." in card(run, "ab" * 32, "file:///x/mine", "mine")


def test_the_cost_of_what_a_run_was_started_from_is_said_to_be_unknown(tmp_path):
    cost = Cost(example_passes=1, forward_passes=0, seconds=1.0, peak_memory=None, device="cpu", entries={})
    cost.entries["checkpoint"] = CostEntry(seconds=None, device="unknown", origin="weights.pt")
    run = manifest_of(make_run(tmp_path / "run")) | {"cost": cost.model_dump()}
    bundle = manifest_of(make_bundle(tmp_path / "bundle")) | {"training_cost": cost.model_dump()}
    for manifest in (run, bundle):
        text = card(manifest, "ab" * 32, "file:///x/mine", "mine")
        assert "The training cost of weights.pt." in text


def test_a_cost_that_is_all_unknown_is_no_number(tmp_path):
    cost = Cost(example_passes=None, forward_passes=0, seconds=None, peak_memory=None, device="unknown", entries={})
    cost.entries["solution 1"] = CostEntry(seconds=None, device="unknown", origin="a.pt")
    run = manifest_of(make_run(tmp_path / "run")) | {"cost": cost.model_dump()}
    assert rows(card(run, "ab" * 32, "file:///x/mine", "mine"))["training cost"] == [
        "unknown: trained elsewhere (a.pt)"
    ]


def test_an_artefact_that_says_nothing_has_one_too():
    for kind in ("run", "bundle"):
        found = rows(card({"kind": kind, "files": {}}, "ab" * 32, "file:///x/y", "y"))
        assert found["method"] == found["dataset"] == found["classes"] == found["created"] == ["not recorded"]


def test_names_break_neither_tables_nor_the_front_matter(run):
    run = copy.deepcopy(run)
    evil = "a | b\n---\n<script>x</script>: {y} '\" `z`"
    run["method"] = run["architecture"] = evil
    run["dataset"] |= {"title": evil, "name": f"folder:/home/me/{evil}", "classes": [evil] * 50}
    text = card(run, "ab" * 32, "file:///x/mine", "mine")
    assert front_matter(text)["tags"][-1] == " ".join(evil.split())
    assert "<script>" not in text.split("\n---\n", 1)[1]
    found = rows(text)
    assert found["dataset"] == ["a \\| b --- &lt;script>x&lt;/script>: {y} '\" `z`"]
    assert found["classes"][0].startswith("50: a ")
    assert found["classes"][0].endswith(" and 30 more")
    (result,) = front_matter(text)["model-index"][0]["results"]
    assert result["dataset"]["type"] == "folder"  # where it lay is nobody's business
    assert "/home/me" not in text


def test_the_hub_reads_its_scores(run):
    repocard = pytest.importorskip("huggingface_hub.repocard")
    data = repocard.ModelCard(card(run, "ab" * 32, "hf://user/mine", "mine")).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("ensembler", "image-classification", "mine")
    assert {(one.metric_type, one.metric_value) for one in data.eval_results} == {
        ("accuracy", 0.9125),
        ("nll", 0.34567),
    }
    assert {(one.dataset_name, one.dataset_type) for one in data.eval_results} == {("made by hand", "none")}
