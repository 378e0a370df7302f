"""What a training reports on its way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensembler.trainers.plan import Epoch

__all__ = ["EpochEnd", "Event", "Message", "OnEvent", "Progress", "named"]


@dataclass(frozen=True)
class EpochEnd:
    """An epoch of a part has ended; the part has ``epochs`` in all, and ``metric`` names its second number."""

    part: str
    epoch: Epoch
    epochs: int
    metric: str

    def record(self) -> dict[str, Any]:
        """The part and the epoch's numbers by name, as logs and histories hold them; those that are finite."""
        names = {"metric": self.metric, "held_out_metric": f"held_out_{self.metric}"}
        numbers = {names.get(name, name): number for name, number in asdict(self.epoch).items()}
        return {"part": self.part} | {
            name: number for name, number in numbers.items() if number is not None and math.isfinite(number)
        }


@dataclass(frozen=True)
class Progress:
    """Of a part's ``total`` examples, those of all its epochs or measurements, ``done`` are through."""

    part: str
    done: int
    total: int


@dataclass(frozen=True)
class Message:
    """What is found on the way, in one line; if it is a ``result``, for standard output."""

    text: str
    result: bool = False


Event = EpochEnd | Progress | Message
OnEvent = Callable[[Event], None]


def named(prefix: str, on_event: OnEvent) -> OnEvent:
    """A function that passes events on, with ``prefix`` before the names of their parts and their texts."""

    def emit(event: Event) -> None:
        if isinstance(event, Message):
            on_event(replace(event, text=prefix + event.text))
        else:
            on_event(replace(event, part=prefix + event.part))

    return emit
