"""Export a run's members to ONNX, run them without torch, and serve them with their uncertainty."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ensembler._lazy import exports
from ensembler.text import Printable

if TYPE_CHECKING:
    from ensembler.serve.export.bundle import export_run
    from ensembler.serve.runtime.runtime import Runtime

__all__ = ["Runtime", "export_run"]

# Where it has one, ONNX Runtime's telemetry keeps a database in the user's home and sends what models it opens.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

for _name in ("ensembler.serve", "ensembler.access"):  # before any module of the layer logs
    logging.getLogger(_name).addFilter(Printable())

__getattr__, __dir__ = exports(
    __name__,
    {"Runtime": "ensembler.serve.runtime.runtime:Runtime", "export_run": "ensembler.serve.export.bundle:export_run"},
)
