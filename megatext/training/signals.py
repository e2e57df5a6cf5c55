"""Being asked to stop: what a cluster sends before it takes the machine away."""

import signal
from types import FrameType

REQUEUE_EXIT_CODE = 75
"""Exit status after SIGTERM or SIGUSR1: a checkpoint is saved, start the same command again to continue."""


class StopSignal:
    """Inside `with`, SIGTERM and SIGUSR1 are noted in `received` and do nothing else."""

    received = False

    def __enter__(self) -> "StopSignal":
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
