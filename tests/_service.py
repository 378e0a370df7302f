"""The service under test: in this process, or as a user starts it; and bundles for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry

from ensembler.prediction import Prediction
from ensembler.serve import Runtime
from ensembler.serve.http.application import application
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.drift import MEASURES, bin_values
from ensembler.serve.runtime.manifest import Validation, read_bundle
from ensembler.storage import artefact
from tests._ports import free_port  # noqa: F401  tests find it here
from tests._runs import CLASSES, TINY, make_bundle

with warnings.catch_warnings():  # of httpx in Starlette's test client
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

ROUTE = "/predictive-uncertainty"
LIMIT = 100_000
PATIENT = {f"ENSEMBLER_{name}": "600000" for name in ("DEADLINE_MS", "BODY_MS", "DECODE_MS")}  # on a busy machine


@contextmanager
def in_process(bundle: Path, registry: CollectorRegistry | None = None, **environment: str) -> Iterator[TestClient]:
    """The application in this process, without BentoML, with small limits; ``client.app`` is the application."""
    limits = {"ENSEMBLER_MAX_BATCH": "4", "ENSEMBLER_MAX_BODY": str(LIMIT)}
    settings = Settings.read({"ENSEMBLER_BUNDLE": str(bundle)} | PATIENT | limits | environment)
    with TestClient(application(settings, registry=registry), raise_server_exceptions=False) as client:
        yield client


def tiny_images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *TINY), dtype=np.uint8)


def make_calibrated(path: Path, risk: float | None = 0.2) -> Path:
    """:func:`make_bundle` with a calibration fitted on images labelled by chance, and what is known of validation."""
    from tests._evaluate import fit

    plain = make_bundle(path.with_name(f"{path.name}-plain"))
    manifest = read_bundle(plain)
    runtime = Runtime.load(plain)
    known = runtime.predict(tiny_images(400))
    labels = np.random.default_rng(0).integers(0, len(CLASSES), 400)
    labels = np.where(known.probabilities.max(axis=1) > 0.5, known.classes, labels)
    fitted = fit(
        known.probabilities,
        labels,
        risk=risk,
        run_sha256=manifest.run.sha256,
        dataset=manifest.dataset,
        validation_sha256="2" * 64,
    ).model_dump()
    fitted["sha256"] = hashlib.sha256(json.dumps(fitted, sort_keys=True).encode()).hexdigest()
    levels = [0.0, 0.5, 0.9, 1.0]
    assert known.mutual_information is not None
    manifest.calibration = "calibration.json"
    manifest.validation = Validation(
        examples=400,
        accuracy=0.5,
        nll=1.0,
        levels=levels,
        predictive_entropy=np.quantile(known.predictive_entropy, levels).tolist(),
        mutual_information=np.quantile(known.mutual_information, levels).tolist(),
        drift=[bin_values(name, values, len(CLASSES)) for name, values in measures(known).items()],
    )
    with artefact.write(path, manifest.model_dump(exclude={"files"})) as folder:
        for file in manifest.files:
            shutil.copy(plain / file, folder)
        (folder / "calibration.json").write_text(json.dumps(fitted))
    return path


def measures(prediction: Prediction) -> dict[str, np.ndarray]:
    """What drift is judged by."""
    assert prediction.mutual_information is not None
    named = (prediction.predictive_entropy, prediction.mutual_information, prediction.classes)
    return dict(zip(MEASURES, named, strict=True))


def assert_refused(answer: Any, *statuses: int) -> str:
    """A refusal is a 4xx with one sentence that gives nothing away; returns the sentence."""
    assert 400 <= answer.status_code < 500, answer.text
    assert not statuses or answer.status_code in statuses, answer.text
    assert list(answer.json()) == ["error"]
    sentence: str = answer.json()["error"]
    assert 20 < len(sentence) < 300
    secrets = ("Traceback", "\n", ".py", f"{os.sep}work", f"{os.sep}tmp", f"{os.sep}home")
    assert not any(secret in sentence for secret in secrets), sentence
    assert not re.search("0x[0-9a-f]{8}", sentence), f"an address: {sentence}"
    return sentence


def unless_late(seconds: float, attempt: Callable[[], None]) -> None:
    """Do what a server waits for no longer than some seconds; once more where this machine took longer."""
    for left in range(20, -1, -1):
        began = time.monotonic()
        try:
            return attempt()
        except (AssertionError, OSError):
            if time.monotonic() - began < seconds or not left:
                raise


class Server:
    """A real server, started as a user starts it."""

    def __init__(self, command: list[str], folder: Path, port: int, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ENSEMBLER_")}
        home = {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=folder,
                env=ours | home | PATIENT | environment,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self, workers: int = 1) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                ready = self.get("/readyz").status_code == 200
                if ready and self.log.read_text().count(" initialized") >= workers:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        pytest.fail(f"the server did not become ready:\n{self.log.read_text()}")

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=600, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=600, **options)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def shares(self) -> list[int]:
        """Open connections of each worker that has any."""
        port = int(self.url.rpartition(":")[2])
        counts = [
            sum(each.laddr.port == port and each.status == "ESTABLISHED" for each in process.net_connections())
            for process in self.family()
        ]
        return [count for count in counts if count]

    def stop(self, by: signal.Signals) -> None:
        """Stop it, and make sure that it left no process behind."""
        family = self.family()
        self.process.send_signal(by)
        try:
            assert self.process.wait(timeout=600) == 0
            _, orphans = psutil.wait_procs(family, timeout=600)
            assert family and not orphans
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            self.process.kill()
            self.process.wait()
