"""What decides a run, resolved: the method, the settings, the data and what it starts from. One hash stands for it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ensembler.errors import ArtefactError
from ensembler.record import Record
from ensembler.run import DatasetRecord

__all__ = ["SPEC", "Spec", "unfinished"]

SPEC = "spec.json"


def unfinished(path: Path) -> Path:
    """Where what has been reached of the run that is to be at ``path`` lies."""
    return path.with_name(f"{path.name}.unfinished")


class Spec(Record):
    """A run before it is made.

    Attributes:
        command: the method's.
        options: the method's, every one, resolved.
        settings: every one, resolved.
        dataset: the data.
        task: what outputs mean.
        starts: SHA-256 of each run or file that training starts from, by its path.
        collapse: whether only the centroid of the vertices is kept.
        code: SHA-256 of the user's own code that the settings name: network, loss, augmentation, ...
        url: where the finished run is pushed to, if anywhere.
        fingerprint: SHA-256 of all that decides the result: everything but paths, and how it is computed.
    """

    command: str
    options: dict[str, Any]
    settings: dict[str, Any]
    dataset: DatasetRecord
    task: str = "classification"
    starts: dict[str, str] = Field(default_factory=dict)
    collapse: bool = False
    code: list[str] = Field(default_factory=list)
    url: str | None = None
    fingerprint: str = ""

    def fingerprinted(self, left_out: set[str]) -> Spec:
        """The same with its fingerprint, for which the options and settings of the names ``left_out`` do not count."""
        content = self.model_dump(exclude={"fingerprint", "starts", "dataset", "url"})
        for part in ("options", "settings"):
            content[part] = {name: value for name, value in content[part].items() if name not in left_out}
        content["starts"] = list(self.starts.values())
        data = self.dataset
        content["data"] = [data.shape, data.train_sha256, data.validation_sha256, data.test_sha256, data.mean, data.std]
        text = json.dumps(content, sort_keys=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()})

    def write(self, folder: Path) -> None:
        """Write it to ``folder``, flushed to disk."""
        with (folder / SPEC).open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """What :meth:`write` wrote.

        Raises:
            ArtefactError: it is missing or damaged.
        """
        try:
            return cls.model_validate_json((folder / SPEC).read_text("utf-8"))
        except (OSError, ValueError, ValidationError) as error:
            raise ArtefactError(f"{folder} does not say what it was begun with: remove it") from error
