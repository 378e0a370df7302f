"""The BentoML service over one bundle; what it answers is :mod:`ensembler.serve.http.application`.

Start it with ``ensembler serve BUNDLE``, or from any folder::

    ENSEMBLER_BUNDLE=bundles/NAME bentoml serve ensembler.serve.service:PredictiveUncertainty
"""

# BentoML ships no types.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import logging
import os
from typing import Any

import bentoml
import numpy as np
from starlette.applications import Starlette

from ensembler.errors import EnsemblerError
from ensembler.serve.http.application import application
from ensembler.serve.http.options import Options
from ensembler.serve.http.routes import JSON
from ensembler.serve.http.schemas import Answer
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.manifest import read_bundle

__all__ = ["PredictiveUncertainty"]


class Images(bentoml.IODescriptor):
    """A batch of images (B, H, W, 3)."""

    images: np.ndarray


class Question(Options, Images):
    """A batch of images and the options of its answer."""


class _Service(bentoml.Service):
    """Answers our routes before BentoML's middlewares, whose timeout keeps each request in memory until it is over."""

    def to_asgi(self, is_main: bool = True) -> Starlette:
        logging.getLogger("ensembler").setLevel(logging.INFO)  # BentoML's root logger writes it
        self.inner.application = application(Settings.read(), otherwise=super().to_asgi(is_main))
        return self.inner.application


@bentoml.service(
    workers=Settings.read(os.environ | {"ENSEMBLER_BUNDLE": "."}).workers,  # read before there is a bundle
    logging={"access": {"enabled": False}},  # the application has its own
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
            read_bundle(settings.bundle, settings.require_signature)
        except EnsemblerError as error:
            raise bentoml.exceptions.BentoMLException(str(error)) from error

    @bentoml.api(route=JSON, input_spec=Question, output_spec=Answer)
    async def predictive_uncertainty(self, images: np.ndarray, **options: Any) -> Answer:
        """Predict a batch of images (B, H, W, 3), whole numbers from 0 to 255."""
        return Answer.model_validate(await self.application.state.predictor.answer(images, options))
