"""Drift: the index against its formula, its bound against simulation, the log of answers and what it shows."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import DataError, UsageError
from ensembler.serve import Runtime
from ensembler.serve.answer_log import drift_of
from ensembler.serve.http.metrics import Exposition, Metrics
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.drift import Window, bin_values, bound, stability
from tests._runs import TINY, make_bundle
from tests._service import ROUTE, in_process, make_calibrated, measures

WIDE = {"ENSEMBLER_MAX_BATCH": "1000", "ENSEMBLER_MAX_BODY": "1000000", "ENSEMBLER_DRIFT_WINDOW": "200"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated(tmp_path_factory.mktemp("drift") / "bundle")


def test_the_index_is_its_formula() -> None:
    p, q = [(3 + 0.5) / 11, (7 + 0.5) / 11], [(40 + 0.5) / 101, (60 + 0.5) / 101]
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert stability([3, 7], [40, 60]) == pytest.approx(by_hand)
    assert stability([0, 0, 5], [5, 0, 0]) < math.inf


def test_bins_are_deciles_and_many_equal_values_share_one() -> None:
    values = np.arange(1, 1001) / 1000
    assert bin_values("predictive_entropy", values, 5).counts == [100] * 10
    zeros = bin_values("mutual_information", np.r_[np.zeros(700), values[:300]], 5)
    assert zeros.edges[0] == 0 and zeros.counts[0] == 700 and sum(zeros.counts) == 1000
    moved, exact = Window([zeros], 50), Window([zeros], 50)
    moved.add({"mutual_information": np.full(50, 3e-9)})  # rounded otherwise on another machine: still zeros
    exact.add({"mutual_information": np.zeros(50)})
    assert moved.indices() == exact.indices()
    assert bin_values("class", [0, 0, 4], 5).counts == [2, 0, 0, 0, 1]


@pytest.mark.parametrize(("validation", "images", "bins"), [(300, 1000, 10), (1000, 200, 10), (1000, 500, 40)])
def test_the_bound_holds_where_nothing_drifts_and_not_where_it_does(validation: int, images: int, bins: int) -> None:
    """Against fresh validation splits and windows of one population, which the bootstrap does not know."""
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.full(bins, 5.0))
    tilted = shares * np.exp(np.linspace(-1, 1, bins))
    splits = rng.multinomial(validation, shares, 25)
    beyond = drifted = 0
    for split in splits:
        allowed = bound(split.tolist(), images)
        beyond += int((stability(rng.multinomial(images, shares, 240), split) > allowed).sum())
        drifted += int((stability(rng.multinomial(images, tilted / tilted.sum(), 20), split) > allowed).sum())
    assert beyond <= 0.005 * 6000  # 0.001 meant, of 6,000 windows that share 25 splits
    assert drifted >= 0.99 * 500


def images(generator: np.random.Generator, count: int, drifted: bool = False) -> np.ndarray:
    """Images as those of the validation of :func:`make_calibrated`, or dark ones."""
    whole = generator.integers(0, 256, (count, *TINY), dtype=np.uint8)
    return whole // 4 if drifted else whole


def ask(client: Any, batch: np.ndarray, **options: str) -> None:
    headers = {"X-Shape": ",".join(map(str, batch.shape))}
    assert client.post(ROUTE, content=batch.tobytes(), headers=headers, params=options).status_code == 200


def gauges(source: CollectorRegistry | Exposition) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"index": {}, "bound": {}}
    text = source.text() if isinstance(source, Exposition) else generate_latest(source)
    for line in text.decode().splitlines():
        for kind, values in found.items():
            if line.startswith(f"ensembler_drift_{kind}{{"):
                measure, value = line.partition('measure="')[2].split('"} ')
                values[measure] = float(value)
    return found


def test_the_service_measures_drift_over_a_full_window(bundle: Path) -> None:
    registry, rng = CollectorRegistry(), np.random.default_rng(5)
    with in_process(bundle, registry, **WIDE) as client:
        assert set(gauges(registry)["bound"]) == {"predictive_entropy", "mutual_information", "class"}
        ask(client, images(rng, 150))
        ask(client, images(rng, 100), mode="exact")  # fewer members say nothing of drift
        assert gauges(registry)["index"] == {}
        ask(client, images(rng, 150))
        before = gauges(registry)
        assert len(before["index"]) == 3
        assert all(value <= before["bound"][measure] for measure, value in before["index"].items())
        ask(client, images(rng, 250, drifted=True))
        after = gauges(registry)
        assert any(value > after["bound"][measure] for measure, value in after["index"].items())
    other = CollectorRegistry()
    with in_process(bundle, other, ENSEMBLER_MEMBERS="2"):
        assert gauges(other) == {"index": {}, "bound": {}}


def test_a_log_of_answers_shows_when_drift_began(bundle: Path, tmp_path: Path) -> None:
    log, rng = tmp_path / "answers.jsonl", np.random.default_rng(5)
    batches = [images(rng, 200), images(rng, 200), images(rng, 200, drifted=True)]
    with in_process(bundle, ENSEMBLER_LOG_ANSWERS=str(log), **WIDE) as client:
        for batch in batches:
            ask(client, batch)
        ask(client, batches[0][:30], mode="exact")
        assert str(log) not in client.get("/metadata").text
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert list(lines[0]) == ["bundle", "members", "reference"] and len(lines) == 631
    runtime = Runtime.load(bundle)
    known = runtime.predict(batches[0])
    assert [line["class_index"] for line in lines[1:201]] == known.classes.tolist()
    assert [line["mutual_information"] for line in lines[1:201]] == measures(known)["mutual_information"].tolist()
    assert set(map(len, lines[1:])) == {10}  # no pixel among them
    found = drift_of(log, 200)
    assert (found.answers, found.left_out, found.window, len(found.windows)) == (600, 30, 200, 3)
    over = [any(index > found.bound[m] for m, index in one.index.items()) for one in found.windows]
    assert over == [False, False, True] and found.drifted
    assert runtime.manifest.validation is not None
    by_hand = Window(runtime.manifest.validation.drift, 200)
    by_hand.add(measures(known))
    assert found.windows[0].index == by_hand.indices()
    result = CliRunner().invoke(app, ["drift", str(log), "--window", "200"], env={"COLUMNS": "80"})
    for figures in (*(one.index for one in found.windows), found.bound):
        assert all(f"{value:.3f}" in result.output for value in figures.values()), "a figure is cut off"
    assert result.exit_code == 0 and "the last window has drifted: " in result.output and "30 others" in result.output
    printed = CliRunner().invoke(app, ["drift", str(log), "--window", "200", "--json"])
    assert json.loads(printed.output)["drifted"] == found.drifted
    with log.open("a") as file:
        file.write('{"bundle": "cut o')  # the service was killed
    assert drift_of(log, 200) == found


def test_a_log_is_sampled_moved_and_lost_without_harm(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, rng = tmp_path / "logs" / "a.jsonl", np.random.default_rng(5)
    log.parent.mkdir()
    sampled = {"ENSEMBLER_LOG_ANSWERS": str(log), "ENSEMBLER_LOG_SAMPLE": "0.1"}
    with in_process(bundle, **sampled, **WIDE) as client:
        ask(client, images(rng, 1000))
        assert 50 < len(log.read_text().splitlines()) < 160
        log.rename(log.with_suffix(".1"))
        ask(client, images(rng, 1000))
        assert drift_of(log, 1000).answers < 160  # with a head of its own
        log.unlink()
        log.mkdir()  # it cannot be written any more
        for _ in range(3):
            ask(client, images(rng, 500))
    assert len([record for record in caplog.records if "cannot be logged" in record.message]) == 1


def test_what_is_no_log_is_told(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"

    def refused(text: str | bytes, message: str) -> None:
        log.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=message):
            drift_of(log, 1000)

    with in_process(bundle, ENSEMBLER_LOG_ANSWERS=str(log), **WIDE) as client:
        ask(client, images(np.random.default_rng(0), 60))
    head, *lines = log.read_text().splitlines()
    beyond = [line.replace('"class_index":', '"class_index":9') for line in lines]
    refused("", "holds no answers")
    refused("hello\n", "line 1 is no answer")
    refused(b"\x93NUMPY\xff\n", "which is text")
    refused("[" * 100_000 + "\n", "line 1 is no answer")
    refused("\n".join([head, *lines[:20], ""]), "holds 20 answers of all members")
    refused("\n".join([head, *lines[:20], "{}", ""]), "line 22 is no answer")
    refused("\n".join([head, *beyond, ""]), "beyond the 5")
    refused("\n".join([json.dumps(json.loads(head) | {"reference": []}), *lines, ""]), "no reference for drift")
    with pytest.raises(DataError, match="cannot read"):
        drift_of(tmp_path / "nothing", 1000)
    result = CliRunner().invoke(app, ["serve", str(bundle), "--log-answers", str(tmp_path / "no" / "log")])
    assert result.exit_code == 1 and "choose another --log-answers" in result.output
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a server that does not start begins no log
        options = ["--log-answers", str(tmp_path / "new"), "--port", str(taken.getsockname()[1])]
        assert CliRunner().invoke(app, ["serve", str(bundle), *options]).exit_code == 2
    assert not (tmp_path / "new").exists()
    for name, value in (("LOG_SAMPLE", "0"), ("LOG_SAMPLE", "1.5"), ("LOG_SAMPLE", "nan"), ("DRIFT_WINDOW", "5")):
        with pytest.raises(UsageError, match=f"ENSEMBLER_{name} must"):
            Settings.read({"ENSEMBLER_BUNDLE": "b", f"ENSEMBLER_{name}": value})


def test_a_bundle_without_validation_images_has_no_drift(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with in_process(make_bundle(tmp_path / "bundle"), registry, **WIDE) as client:
        ask(client, images(np.random.default_rng(0), 300))
    assert gauges(registry) == {"index": {}, "bound": {}}


def test_of_several_workers_the_greatest_drift_is_told(tmp_path: Path, bundle: Path) -> None:
    """A sum of indices would be none."""
    validation = Runtime.load(bundle).manifest.validation
    rng, registries = np.random.default_rng(0), [CollectorRegistry(), CollectorRegistry()]
    for registry, count in zip(registries, (50, 60), strict=True):
        metrics = Metrics(validation, 3, 5, registry, window=50)
        known = Runtime.load(bundle).predict(images(rng, count, drifted=count == 60))
        metrics.answer(measures(known) | {"members_used": known.members_used}, whole=True)
    each = [gauges(registry) for registry in registries]
    (tmp_path / f"metrics-{os.getppid()}.txt").write_bytes(generate_latest(registries[1]))  # a process that runs
    told = gauges(Exposition(registries[0], tmp_path))
    for kind in ("index", "bound"):
        for measure, value in told[kind].items():
            assert value == max(one[kind][measure] for one in each)
    assert len(told["index"]) == 3


def test_a_log_becomes_parquet_as_the_documentation_says(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a service that is started again says its reference again
        with in_process(bundle, **WIDE, ENSEMBLER_LOG_ANSWERS="answers.jsonl") as client:
            images = np.random.default_rng(0).integers(0, 256, (5, *TINY))
            answer = client.post(ROUTE, json={"images": images.tolist()}).json()
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(import pyarrow.json\n.*?)```", text, re.DOTALL)
    exec(compile(code, "serving.md", "exec"), {})
    table = parquet.read_table("answers.parquet")
    assert {"time", "class_index", "predictive_entropy"} <= set(table.column_names)
    expected = [one["predictive_entropy"] for one in answer["predictions"]]
    assert table["predictive_entropy"].to_pylist() == pytest.approx(2 * expected, rel=1e-6)
