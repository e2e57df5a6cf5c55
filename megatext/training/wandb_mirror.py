"""What metrics.jsonl records, also on Weights & Biases, by a thread of its own: a mirror that breaks or hangs costs a
run one line and no time."""

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatext.training.metrics import LoggingConfig

QUEUED_RECORDS = 10_000
"""Records that wait for wandb; further ones are dropped from the mirror."""
FINISH_SECONDS = 60.0
"""How long the end of a run waits for wandb."""


class WandbMirror:
    """One run there for one run directory here, however often it is resumed. Rank 0 only."""

    def __init__(
        self, run_dir: Path, config: "LoggingConfig", resolved: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._settings = (run_dir, config, resolved)
        self._say = say
        self._records: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUED_RECORDS)
        self._thread: threading.Thread | None = None

    def record(self, step: int, figures: dict[str, Any]) -> None:
        """Send figures; never waits. The first ones start the run there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._mirror, name="wandb", daemon=True)
            self._thread.start()
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._records.put_nowait((step, figures))

    def finish(self) -> None:
        """Wait, not for ever, until everything is sent. Idempotent."""
        if self._thread is None or not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._records.put(None, timeout=FINISH_SECONDS)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say("wandb does not answer: what is missing there is in metrics.jsonl")

    def _mirror(self) -> None:
        try:
            run = _start(*self._settings)
        except ImportError:
            self._say("wandb is not installed (pip install wandb): logging to metrics.jsonl only")
            return
        except Exception as error:  # a run must not end because its mirror is broken
            self._say(f"wandb could not be started ({error}): logging to metrics.jsonl only")
            return
        if run.settings.mode == "offline":
            self._say(f"wandb is offline: `wandb sync {run.dir.removesuffix('/files')}` sends the run")
        try:
            while (item := self._records.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish()
        except Exception as error:
            self._say(f"wandb failed ({error}): logging to metrics.jsonl only")


def _start(run_dir: Path, config: "LoggingConfig", resolved: dict[str, Any]) -> Any:
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _read_text(Path.home() / ".netrc")
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return wandb.init(
        project=config.wandb_project,
        group=config.wandb_group,
        name=run_dir.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        mode=config.wandb_mode or os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),  # type: ignore[arg-type]
        dir=str(run_dir),
        config=resolved,
        settings=wandb.Settings(silent=True, console="off"),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
