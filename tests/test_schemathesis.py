"""The service against its own description: some hundreds of requests made by schemathesis, the same every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests._service import TestClient, in_process, make_calibrated

schemathesis = pytest.importorskip("schemathesis")

TOKEN = {"Authorization": "Bearer sesame"}
CASES: Counter[str] = Counter()
