"""The service against its own description: some hundreds of requests made by schemathesis, the same every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from tests._service import TestClient, in_process, make_calibrated

schemathesis = pytest.importorskip("schemathesis")
checks = schemathesis.checks

CASES = {"post": 100, "get": 2}
"""Of each operation and mode."""

TAKING = ("/predictive-uncertainty", "/v2/models/{name}", "/v2/models/{name}/ready", "/v2/models/{name}/infer")
"""Operations that can be asked wrongly."""

ELSEWHERE = [
    checks.ignored_auth,  # asks again by itself, over the network: tests/test_limits.py
    checks.unsupported_method,  # likewise: tests/test_service.py
    checks.positive_data_acceptance,  # that a text is an image's base64, or bytes an image, no schema can say
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    bundle = make_calibrated(tmp_path_factory.mktemp("schemathesis") / "bundle")
    with in_process(bundle) as client:
        yield client


def ask(client: TestClient, case: Any) -> Any:
    """The answer to a case, which is given all the time that it needs: else 504 is right, too."""
    case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "x-deadline-ms"}
    made = case.as_transport_kwargs(base_url=str(client.base_url))
    parts = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    sent = requests.Request(**{name: made[name] for name in parts if name in made}).prepare()
    return client.request(sent.method or "", sent.url or "", headers=dict(sent.headers), content=sent.body)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_the_service_keeps_to_its_description(client: TestClient, mode: Any) -> None:
    statuses: Counter[int] = Counter()
    for found in schemathesis.openapi.from_dict(client.get("/docs.json").json()).get_all_operations():
        operation = found.ok()
        if mode == schemathesis.GenerationMode.NEGATIVE and operation.path not in TAKING:
            continue

        @settings(
            max_examples=CASES[operation.method],
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def keeps(case: Any) -> None:
            answer = ask(client, case)
            statuses[answer.status_code] += 1
            case.validate_response(answer, excluded_checks=ELSEWHERE)

        keeps()
    assert not any(status >= 500 for status in statuses) and statuses[400] > 50 and statuses.total() > 200
    assert statuses[200] > 10 if mode == schemathesis.GenerationMode.POSITIVE else statuses[200] == 0
