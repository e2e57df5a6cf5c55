"""A process that hangs says where, and ends: a collective that one rank never joins would be waited for in silence."""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

HANG_EXIT_CODE = 76
"""Exit status of a process that finished nothing for too long."""

STDERR = 2
"""Its file descriptor: sys.stderr may be replaced."""


class Watchdog:
    """Inside `with`, `beat` must be called at least every `seconds`; 0 never ends anything.

    Every rank has one. When the time is over, each writes the stacks of all its threads to `folder/rank-00000.txt`,
    waits until the others will have done the same (a launcher kills them as soon as one exits) and exits with
    HANG_EXIT_CODE. The rank whose stack is not in a collective is the one that the others wait for.
    """

    def __init__(self, folder: Path, seconds: float, rank: int) -> None:
        self.folder, self.seconds, self.rank = folder, seconds, rank
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("the start")

    def beat(self, finished: str) -> None:
        """Something was finished."""
        self._finished, self._ticks = finished, 0

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.beat("the start")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self.seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        # ticks, not a clock: a process that was suspended has not hung
        tick = min(self.seconds / 20, 5.0)
        while not self._done.wait(tick):
            # For a thread that hangs without letting Python run (a page of a dead network disk), a timer in C; its
            # exit status is 1.
            faulthandler.dump_traceback_later(2 * self.seconds + 60, exit=True, file=STDERR)
            self._ticks += 1
            if self._ticks * tick > self.seconds:
                self._dump()
                time.sleep(min(self.seconds / 4, 30.0))
                os._exit(HANG_EXIT_CODE)

    def _dump(self) -> None:
        told = (
            f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()}) has finished nothing for "
            f"{self.seconds:g} s, since {self._finished}"
        )
        path = self.folder / f"rank-{self.rank:05d}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(told + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            print(f"error: {told}; where it stands is in {path}", file=sys.stderr, flush=True)
        except OSError:  # the disk may be what hangs
            print(f"error: {told}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(STDERR)
