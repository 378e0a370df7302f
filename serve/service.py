"""The BentoML service over one bundle; what it answers is :mod:`ensembler.serve.http.application`.

Start it with ``ensembler serve BUNDLE``, or from any folder::

    ENSEMBLER_BUNDLE=bundles/NAME bentoml serve ensembler.serve.service:PredictiveUncertainty
"""

# BentoML ships no types.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

# BentoML sets it, and Prometheus would then count in memory-mapped files, which end the process on a full disk.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import numpy as np
from starlette.applications import Starlette

from ensembler.errors import EnsemblerError
from ensembler.serve.http.application import application
from ensembler.serve.http.front import Front, stop_this_process
from ensembler.serve.http.intake import join_front
from ensembler.serve.http.options import Options
from ensembler.serve.http.routes import PREDICT
from ensembler.serve.http.schemas import Answer
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.runtime import Runtime
from ensembler.serve.starting import shared_folder

__all__ = ["PredictiveUncertainty"]

_SHARED = "ENSEMBLER_SHARED"  # the folder of one server's processes
_LISTEN = "ENSEMBLER_LISTEN"  # the number of an open file, the public listening socket, by ensembler serve

_failures: list[str] = []


def _fail(sentence: str) -> None:
    """End the server, once."""
    _failures.append(sentence)
    if len(_failures) == 1:
        stop_this_process(sentence)


def _exit_as_failed() -> None:
    if _failures:
        sys.stdout.flush()
        os._exit(1)  # BentoML ends with 0


def _say_unusable_address(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report what ends the server as Python does, but an address at which BentoML cannot listen in one sentence."""
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
        sys.stderr.write(f"Error: cannot listen: {error.strerror}: choose another --host or --port\n")
    else:
        sys.__excepthook__(kind, error, trace)


class Images(bentoml.IODescriptor):
    """A batch of images (B, H, W, 3)."""

    images: np.ndarray


class Question(Options, Images):
    """A batch of images and the options of its answer."""


class _Service(bentoml.Service):
    """Answers our routes before BentoML's middlewares, whose timeout keeps each request in memory until it is over."""

    def to_asgi(self, is_main: bool = True) -> Starlette:
        logging.getLogger("ensembler").setLevel(logging.INFO)  # BentoML's root logger writes it
        settings, shared = Settings.read(), os.environ.get(_SHARED)
        folder = Path(shared) if shared else None
        several = folder if settings.workers > 1 else None
        app = self.inner.application = application(settings, otherwise=super().to_asgi(is_main), shared=several)
        if folder is not None:
            join_front(app, folder, 5 + (settings.body_ms + settings.deadline_ms) // 1000)
        return app


@bentoml.service(
    workers=Settings.read(os.environ | {"ENSEMBLER_BUNDLE": "."}).workers,  # read before there is a bundle
    logging={"access": {"enabled": False}},  # the application has its own
    metrics={"enabled": False},  # likewise; BentoML's have a label for each path that anybody asks for
    service_class=_Service,
)
class PredictiveUncertainty:
    """Predicts images with an ensemble, with the uncertainty of each prediction."""

    application: Starlette

    @bentoml.on_deployment
    @staticmethod
    def verify() -> None:
        """Run once, before any worker, so that an error stops the server instead of restarting its workers."""
        try:
            settings = Settings.read()
            manifest = read_bundle(settings.bundle, settings.require_signature)
            Runtime.check(settings.bundle, manifest, settings.members, settings)
        except EnsemblerError as error:
            raise bentoml.exceptions.BentoMLException(str(error)) from error

    @bentoml.on_deployment
    @staticmethod
    def with_front() -> None:
        """Start the front in the parent of the workers, which BentoML starts with this environment."""
        if os.name != "nt":
            atexit.register(_exit_as_failed)  # runs last
            folder = os.environ[_SHARED] = os.environ.get(_SHARED) or shared_folder()
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            public = None
            if listening := os.environ.pop(_LISTEN, None):
                public = socket.socket(fileno=int(listening))
                public.set_inheritable(False)  # workers have no use for it
                logging.getLogger("bentoml.serve").setLevel(logging.WARNING)  # its line names another address
            front = Front(Path(folder), public, _fail)
            front.start()
            atexit.register(front.close)  # the interpreter takes its time to end
            if public is None:
                sys.excepthook = _say_unusable_address

    @bentoml.api(route=PREDICT, input_spec=Question, output_spec=Answer)
    async def predictive_uncertainty(self, images: np.ndarray, **options: Any) -> Answer:
        """Predict a batch of images (B, H, W, 3), whole numbers from 0 to 255."""
        return Answer.model_validate(await self.application.state.predictor.answer(images, options))
