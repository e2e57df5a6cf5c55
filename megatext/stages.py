"""Runs the stages of a pipeline, each a command, so that an interrupted pipeline continues where it stopped.

A stage's key is a hash of its command, of the files it reads its settings from, of other facts, and of the keys of
the stages it needs. Its marker, a small JSON file, says which key was begun and whether it was finished: a finished
stage is passed over, an interrupted one is continued, and one whose key has changed loses its outputs and is run anew.
A root, on which the others stand, is not: while one of them is done, another key is refused.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from megatext.config import ConfigError

AGAIN = "run the same command again: it continues at this stage"
POLL_SECONDS = 0.1
"""Between two looks at the processes that run."""


class StageError(RuntimeError):
    """A stage that failed or was interrupted. The message is for the user."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stage:
    """One command, and what it depends on."""

    name: str
    """Unique in its pipeline."""
    command: tuple[str, ...]
    """Program and arguments; `python` is the interpreter that runs the pipeline."""
    reads: tuple[Path, ...] = ()
    """Files whose content is part of the stage: configurations."""
    facts: tuple[str, ...] = ()
    """What else it depends on: what tells the corpus's files from others."""
    writes: tuple[Path, ...] = ()
    """Files and directories that exist once it is done; removed before it is run with another key."""
    needs: tuple[str, ...] = ()
    """Earlier stages whose change makes this one run again."""
    continues: bool = False
    """Whether the command picks up its own half-done outputs. If not they are removed before it is run again."""
    root: bool = False
    """Whether the others stand on it: where one of them is done, to make it with another key is refused."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables set for the command. Not part of the key: they may change how fast it is, not what it makes."""
    expected_seconds: float = 60.0
    """A guess that the time left is told from, corrected by the pace of the stages that are done."""

    def shell(self) -> str:
        """The command as one types it."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment), shlex.join(self.command)])


@dataclass
class _Running:
    """A stage at work."""

    stage: Stage
    process: "subprocess.Popen[bytes]"
    began: float
    spent: float
    """Seconds of earlier runs that it continues."""
    log: Path | None
    """Where what it prints goes, if it is not visible."""

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began


def run_stages(
    stages: Sequence[Stage], directory: Path, out: TextIO = sys.stdout, *, jobs: int = 1, keep_going: bool = False
) -> None:
    """Run every stage that is not done, in order and after those it needs, `jobs` at a time.

    `directory` holds all outputs; markers go to its `stages/`. What a stage prints is visible; where several run at
    once it goes to `logs/NAME.log`. Raises StageError when a stage fails (with `keep_going` after all that do not need
    it) or all are interrupted, and ConfigError for a missing file, a directory that cannot be written, or one that was
    made from something else.
    """
    keys, markers = stage_keys(stages), directory / "stages"
    labels = {stage.name: f"[{number:2d}/{len(stages)}] {stage.name}" for number, stage in enumerate(stages, 1)}
    with _lock(markers), _terminating_on_sigterm():
        done = {stage.name: _read(markers, stage) for stage in stages if _is_done(markers, stage, keys[stage.name])}
        for name, marker in done.items():
            print(f"{labels[name]}: done before, in {_clock(marker['seconds'])}", file=out, flush=True)
        waiting = [stage for stage in stages if stage.name not in done]
        _check_roots(stages, [stage for stage in waiting if stage.root], keys, directory)
        running: list[_Running] = []
        failures: list[str] = []
        started = time.monotonic()

        def start(stage: Stage) -> _Running:
            label = labels[stage.name]
            spent = _prepare(markers, stage, keys[stage.name], label, directory, out)
            elapsed, left = time.monotonic() - started, _seconds_left(stages, done) / jobs
            print(f"{label}: elapsed {_clock(elapsed)}, about {_clock(left)} left", file=out)
            print(f"        $ {stage.shell()}", file=out, flush=True)
            log = directory / "logs" / f"{stage.name}.log" if jobs > 1 else None
            return _Running(stage, _start(stage, label, log), time.monotonic(), spent, log)

        def finish(ended: _Running, failure: str | None) -> None:
            name, seconds = ended.stage.name, ended.seconds
            marker = {"key": keys[name], "done": failure is None, "seconds": round(seconds, 1)}
            _write(markers, ended.stage, marker)
            running.remove(ended)
            if failure is None:
                done[name] = marker
                print(f"{labels[name]}: done in {_clock(seconds)}\n", file=out, flush=True)
            else:
                failures.append(failure)
                print(f"{labels[name]}: failed\n", file=out, flush=True)

        try:
            while True:
                while len(running) < jobs and (not failures or keep_going):
                    ready = [stage for stage in waiting if all(name in done for name in stage.needs)]
                    if not ready:
                        break
                    waiting.remove(ready[0])
                    running.append(start(ready[0]))
                if not running:
                    break
                ended = _first_to_end(running)
                finish(ended, _failure(ended, labels[ended.stage.name]))
        except BaseException as error:  # none may go on alone: the lock is released
            names = ", ".join(labels[each.stage.name] for each in running)
            for each in list(running):
                _stop_group(each.process)
                finish(each, "interrupted")
            if isinstance(error, KeyboardInterrupt):
                raise StageError(f"interrupted in stage {names}; {AGAIN}", 130) from None
            raise
        if failures:
            raise StageError("\nerror: ".join(failures), 1)


def run_or_exit(stages: Sequence[Stage], directory: Path, *, jobs: int = 1, keep_going: bool = False) -> None:
    """`run_stages` for a program's main: what fails is told, and ends the program."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it by itself, but with a warning a process
    try:
        run_stages(stages, directory, jobs=jobs, keep_going=keep_going)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)


def _first_to_end(running: Sequence[_Running]) -> _Running:
    while True:
        for each in running:
            if each.process.poll() is not None:
                return each
        time.sleep(POLL_SECONDS)


def _failure(ended: _Running, label: str) -> str | None:
    """What is wrong with a stage that has ended, for the user."""
    status, stage = ended.process.returncode, ended.stage
    if status != 0:
        cause = f"was killed by signal {-status}" if status < 0 else f"failed with exit status {status}"
        place = f"in {ended.log}" if ended.log else "above"
        return f"stage {label} {cause}; its output is {place}. Remove the cause and {AGAIN}"
    missing = [str(path) for path in stage.writes if not path.exists()]
    return f"stage {label} ended well but did not write {', '.join(missing)}" if missing else None


def stage_keys(stages: Sequence[Stage]) -> dict[str, str]:
    """The key of every stage by name. Raises ConfigError where a file it reads is missing."""
    keys: dict[str, str] = {}
    for stage in stages:
        if stage.name in keys:
            raise ConfigError(f"two stages are named {stage.name}")
        missing = [str(path) for path in stage.reads if not path.is_file()]
        if missing:
            raise ConfigError(f"stage {stage.name}: no such file: {', '.join(missing)}")
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.reads]
        content = [list(stage.command), contents, stage.facts, [keys[name] for name in stage.needs]]
        keys[stage.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return keys


def _check_roots(stages: Sequence[Stage], roots: Sequence[Stage], keys: dict[str, str], directory: Path) -> None:
    """A corpus that changed, or another one, does not cost the trainings on the old one without a question."""
    markers = directory / "stages"
    changed = [stage for stage in roots if _read(markers, stage).get("key") != keys[stage.name]]
    made = [s for s in stages if not s.root and _read(markers, s).get("done") and any(p.exists() for p in s.writes)]
    if changed and made:
        raise ConfigError(
            f"{directory} was made from another input or with other options than\n    {changed[0].shell()}\n"
            f"(files count by path and content), and {made[0].name} stands on it. "
            f"Move {directory} away or remove it, or go on with what it was made from"
        )


def _prepare(markers: Path, stage: Stage, key: str, label: str, directory: Path, out: TextIO) -> float:
    """Mark the stage as begun; seconds spent on what it continues. What it may not continue from is removed."""
    marker = _read(markers, stage)
    spent = 0.0
    same = marker.get("key") == key and not marker.get("done")
    if same and stage.continues:
        print(f"{label}: continuing where it was interrupted", file=out)
        spent = float(marker.get("seconds", 0.0))
    else:
        old = [path for path in stage.writes if path.exists()]
        if same:
            print(f"{label}: was interrupted, starting it again", file=out)
        elif old:
            reason = "its command, its configuration or a stage before it changed" if marker else "left by another run"
            print(f"{label}: removing {', '.join(map(str, old))} ({reason})", file=out)
        for path in old:
            if not path.resolve().is_relative_to(directory.resolve()):
                raise ConfigError(f"stage {stage.name}: {path} is outside {directory}; remove it yourself")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(markers, stage, {"key": key, "done": False, "seconds": spent})
    return spent


def _start(stage: Stage, label: str, log: Path | None) -> "subprocess.Popen[bytes]":
    """The stage's process, its output visible or at the end of a log. Raises StageError."""
    own = Path(sys.executable).parent
    environment = {
        **os.environ,
        **dict(stage.environment),
        # the environment this interpreter lives in comes first, so that `deepspeed` is its own
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable if part == "python" and i == 0 else part for i, part in enumerate(stage.command)]
    with ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(exist_ok=True)
            output = stack.enter_context(open(log, "ab"))
        try:
            # a session of its own: what the command starts (launcher, ranks) can be told to stop, and waited for
            return subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=output, stderr=output and subprocess.STDOUT
            )
        except OSError as error:
            cause = f"cannot start {command[0]}: {error.strerror}; `make setup` installs it"
            raise StageError(f"stage {label}: {cause}", 1) from None


def _stop_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the command and all it started, then wait until none of them is left: they write to the run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    while _is_alive(process.pid):
        time.sleep(0.1)


def _is_alive(group: int) -> bool:
    """Whether a process of the group runs; zombies do not count, in a container they may stay for ever."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _seconds_left(stages: Sequence[Stage], done: dict[str, dict[str, Any]]) -> float:
    """Expected time of what is not done, at the pace of what is."""
    total = sum(stage.expected_seconds for stage in stages)
    expected = sum(stage.expected_seconds for stage in stages if stage.name in done)
    # the expectation counts as a fifth of the whole at pace 1, or the first short stage would decide
    pace = (sum(marker["seconds"] for marker in done.values()) + total / 5) / (expected + total / 5)
    return pace * (total - expected)


def _is_done(markers: Path, stage: Stage, key: str) -> bool:
    marker = _read(markers, stage)
    return marker.get("key") == key and bool(marker.get("done")) and all(path.exists() for path in stage.writes)


def _read(markers: Path, stage: Stage) -> dict[str, Any]:
    try:
        return json.loads((markers / f"{stage.name}.json").read_text())
    except (OSError, ValueError):
        return {}


def _write(markers: Path, stage: Stage, marker: dict[str, Any]) -> None:
    temporary = markers / f"{stage.name}.json.tmp"
    temporary.write_text(json.dumps(marker) + "\n")
    temporary.replace(markers / f"{stage.name}.json")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def _lock(markers: Path) -> Iterator[None]:
    """Keeps two runners out of one directory. Released by the system when the process ends, however it ends."""
    try:
        markers.mkdir(parents=True, exist_ok=True)
        file = open(markers / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write to {markers}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another run is at work in {markers.parent}; wait for it or stop it") from None
        yield


@contextmanager
def _terminating_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the stage's process as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def share_of_threads(processes: int) -> tuple[tuple[str, str], ...]:
    """OMP_NUM_THREADS for several processes that share this machine's cores; nothing where there is an accelerator."""
    if processes == 1:
        return ()
    import torch

    if torch.accelerator.is_available():
        return ()
    return (("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes))),)
