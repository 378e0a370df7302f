"""Checkpoints that break the training off after so many of them."""

from __future__ import annotations

from ensembler.trainers.checkpoints import Checkpoints


class BreakingOff(Checkpoints):
    """Writes at every step, and raises ``KeyboardInterrupt`` after the ``left``-th."""

    left = 0

    def save(self, number, part, saved):
        super().save(number, part, saved)
        self.left -= 1
        if self.left == 0:
            self.close()  # as the end of a process does
            raise KeyboardInterrupt
