"""What training did and cost, entry by entry, so that the books of pieces made elsewhere add up to a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ensembler.run import Part

__all__ = ["Books"]


@dataclass(eq=False)
class Books:
    """One training's, or a piece's.

    Attributes:
        parts: what each part cost.
        history: one mapping for each epoch, with the ``seconds`` since these books were opened.
        seconds: spent in all.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Books) -> None:
        """Enter what the books of a later piece hold: as if it had begun when these ended.

        Counts and seconds add up; of the memory, the larger peak stands.
        """
        for name, new in other.parts.items():
            old = self.parts.setdefault(name, Part(device=new.device))
            old.example_passes += new.example_passes
            old.forward_passes += new.forward_passes
            old.seconds = None if new.seconds is None else round((old.seconds or 0.0) + new.seconds, 3)
            old.peak_memory = max(filter(None, (old.peak_memory, new.peak_memory)), default=None)
            old.origin = old.origin or new.origin
        for record in other.history:
            self.history.append(record | {"seconds": round(self.seconds + record["seconds"], 3)})
        self.seconds += other.seconds
