"""What Prometheus is told, and whether the example rules and the example dashboard ask for what exists."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ensembler.serve.http.metrics import Exposition, Metrics, Requests
from ensembler.serve.runtime.drift import bin_values
from ensembler.serve.runtime.manifest import Validation
from tests._runs import make_bundle, tiny_weights
from tests._service import ROUTE, Server, free_port, in_process, make_calibrated, tiny_images

DOCS = Path(__file__).parents[1] / "docs"
LEVELS = [0.0, 0.5, 0.9, 1.0]


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def made(validation: Validation | None, members: int = 3) -> tuple[Metrics, CollectorRegistry]:
    registry = CollectorRegistry()
    Requests(registry)
    return Metrics(validation, members, 5, registry), registry


def validation(entropy: list[float], information: list[float] | None) -> Validation:
    return Validation(
        examples=9,
        accuracy=1,
        nll=0,
        levels=LEVELS,
        predictive_entropy=entropy,
        mutual_information=information,
        drift=[bin_values("predictive_entropy", entropy * 20, 5), bin_values("class", [0, 1, 2, 3, 4] * 20, 5)],
    )


def columns(entropy: list[float], information: list[float], used: list[int]) -> dict[str, Any]:
    return {
        "class": np.zeros(len(used), int),
        "predictive_entropy": np.array(entropy),
        "mutual_information": np.array(information),
        "members_used": np.array(used),
        "abstain": np.array([True] + [False] * (len(used) - 1)),
    }


def test_buckets_are_the_quantiles_of_validation() -> None:
    metrics, registry = made(validation([0.1, 0.4, 0.8, 1.2], [0.0, 0.0, 0.2, 0.3]))
    metrics.answer(columns([0.1, 0.3, 0.5, 1.3], [0.0, 0.1, 0.25, 0.4], [3] * 4), whole=True)
    found = samples(generate_latest(registry).decode())

    def buckets(name: str) -> dict[str, float]:
        rows = {dict(labels)["le"]: n for (sample, labels), n in found.items() if sample == f"ensembler_{name}_bucket"}
        return rows

    assert buckets("predictive_entropy_nats") == {"0.1": 1, "0.4": 2, "0.8": 3, "1.2": 3, "+Inf": 4}
    assert buckets("mutual_information_nats") == {"0.0": 1, "0.2": 2, "0.3": 3, "+Inf": 4}
    assert found["ensembler_validation_nats", frozenset({("measure", "mutual_information"), ("level", "0.9")})] == 0.2
    assert found["ensembler_abstentions_total", frozenset({("abstained", "true")})] == 1
    assert found["ensembler_abstentions_total", frozenset({("abstained", "false")})] == 3
    assert found["ensembler_members_used_sum", frozenset()] == 12


def test_fewer_members_say_nothing_of_drift() -> None:
    metrics, registry = made(None)
    metrics.answer(columns([0.1, 0.3], [0.0, 0.1], [2, 3]), whole=False)
    found = samples(generate_latest(registry).decode())
    assert found["ensembler_mutual_information_nats_count", frozenset()] == 0
    assert found["ensembler_predictive_entropy_nats_count", frozenset()] == 0
    assert found["ensembler_members_used_count", frozenset()] == 2


def test_one_nan_spoils_no_sum() -> None:
    metrics, registry = made(None)
    for entropy in (np.nan, np.inf, 0.5):
        metrics.answer(columns([entropy], [entropy], [3]), whole=True)
    found = samples(generate_latest(registry).decode())
    for name in ("predictive_entropy", "mutual_information"):
        assert found[f"ensembler_{name}_nats_sum", frozenset()] == 0.5
        assert found[f"ensembler_{name}_nats_count", frozenset()] == 1


def test_a_member_that_answers_nan_spoils_no_sum(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    weights = tiny_weights(3)
    weights[1] = np.nan
    with in_process(make_bundle(tmp_path / "bundle", weights=weights), registry) as client:
        assert client.post(ROUTE, json={"images": tiny_images(1).tolist()}).status_code == 500
    found = samples(generate_latest(registry).decode())
    assert all(np.isfinite(value) for value in found.values())
    assert found["ensembler_requests_total", frozenset({("route", ROUTE), ("status", "500")})] == 1


def test_a_metric_that_cannot_be_written_harms_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on a full disk, where the counts of all workers lie."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with in_process(make_bundle(tmp_path / "bundle")) as client:
        for kind in (Histogram, Gauge, Counter):
            for method in {"observe", "set", "inc"} & set(dir(kind)):
                monkeypatch.setattr(kind, method, full)
        body = {"images": tiny_images(2).tolist()}
        answers = [client.post(ROUTE, json=body, headers={"X-Deadline-Ms": "600000"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3


@pytest.mark.parametrize("members", [1, 2, 100])
def test_buckets_without_validation_span_what_is_possible(members: int) -> None:
    metrics, registry = made(None, members)
    metrics.answer({"predictive_entropy": np.array([np.log(5)]), "members_used": np.array([members])}, whole=True)
    found = samples(generate_latest(registry).decode())
    assert found["ensembler_members_used_sum", frozenset()] == members
    edges = [float(dict(labels)["le"]) for name, labels in found if name == "ensembler_predictive_entropy_nats_bucket"]
    assert sorted(edges)[-2] == pytest.approx(np.log(5))


def test_the_metrics_of_several_workers_are_added_up(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getppid()):  # one that has ended, one that runs
        metrics, registry = made(validation([0.1, 0.4, 0.8, 1.2], [0.1, 0.2, 0.3, 0.4]))
        metrics.answer(columns([0.3, 0.5], [0.1, 0.1], [3, 3]), whole=True)
        metrics.batch(2, waiting=7)
        (tmp_path / f"metrics-{process}.txt").write_bytes(generate_latest(registry))
    metrics, registry = made(validation([0.1, 0.4, 0.8, 1.2], [0.1, 0.2, 0.3, 0.4]))
    metrics.batch(1, waiting=1)
    found = samples(Exposition(registry, tmp_path).text().decode())
    assert found["ensembler_batch_images_sum", frozenset()] == 5
    assert found["ensembler_batch_images_bucket", frozenset({("le", "1.0")})] == 1
    assert found["ensembler_abstentions_total", frozenset({("abstained", "true")})] == 2
    assert found["ensembler_waiting_images", frozenset()] == 8
    assert found["ensembler_validation_nats", frozenset({("measure", "mutual_information"), ("level", "0.9")})] == 0.3


def test_metrics_that_cannot_be_written_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics, registry = made(None)
    metrics.batch(3, waiting=0)
    exposition = Exposition(registry, tmp_path / "no such folder")
    for _ in range(3):
        exposition.write()
        assert samples(exposition.text().decode())["ensembler_batch_images_sum", frozenset()] == 3
    assert len(caplog.records) == 1


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\bensembler_\w+", text))


def test_rules_and_dashboard_ask_for_what_exists() -> None:
    metrics, registry = made(validation([0.1, 0.4, 0.8, 1.2], [0.1, 0.2, 0.3, 0.4]))
    for stage in ("read", "queue", "predict", "write"):
        metrics.stages({stage: 0.1})
    for _ in range(1000):
        metrics.answer(columns([0.1], [0.1], [3]), whole=True)
    exist = {name for name, _ in samples(generate_latest(registry).decode())} | {"ensembler_requests_total"}
    rules = yaml.safe_load((DOCS / "alerts.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        assert asked_for(expression) and asked_for(expression) <= exist, expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    told = asked_for((DOCS / "serving.md").read_text())
    families = {family.name for family in registry.collect()}
    assert families <= {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in told}
    assert told <= exist | families


def test_a_real_server_tells_prometheus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(make_calibrated(tmp_path / "bundle"))]
    server = Server(command, tmp_path, free_port(), ENSEMBLER_TOKEN="sesame")
    with httpx.Client(base_url=server.url, timeout=300, headers={"Authorization": "Bearer sesame"}) as caller:
        try:
            server.wait_until_ready()
            assert caller.post(ROUTE, json={"images": tiny_images(5).tolist()}).status_code == 200
            assert caller.post(ROUTE, json={"images": tiny_images(2).tolist(), "mode": "exact"}).status_code == 200
            file = io.BytesIO()
            np.save(file, tiny_images(3))
            headers = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
            assert caller.post(ROUTE, content=file.getvalue(), headers=headers).status_code == 200
            for body in (b"", b"{}", b"[]"):
                assert caller.post(ROUTE, content=body).status_code == 400
            assert server.get("/metrics").status_code == 401
            statuses = {caller.get(f"/{number}{'x' * 60_000}").status_code for number in range(20)}
            assert statuses == {404}
            assert len(caller.get("/metrics").content) < 60_000  # nothing that anybody asks for is a label
            assert server.log.stat().st_size < 60_000
            found = samples(caller.get("/metrics").text)
        finally:
            server.stop(signal.SIGTERM)

    def total(name: str, **labels: str) -> float:
        rows = (value for (sample, of), value in found.items() if sample == name and labels.items() <= dict(of).items())
        return sum(rows)

    assert total("ensembler_batch_images_sum") == 10
    assert total("ensembler_batch_images_count") == 3
    assert total("ensembler_members_used_count") == 10
    assert total("ensembler_mutual_information_nats_count") == 8
    assert total("ensembler_abstentions_total") == 8
    assert total("ensembler_requests_total", status="200", route=ROUTE) == 3
    assert total("ensembler_requests_total", status="400", route=ROUTE) == 3
    assert total("ensembler_requests_total", status="401", route="/metrics") == 1
    for stage in ("read", "queue", "predict", "write"):
        assert total("ensembler_stage_seconds_count", stage=stage) == 3
    assert total("ensembler_validation_nats", measure="mutual_information", level="0.9") > 0
