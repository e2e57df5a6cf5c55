import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from megatext.config import ConfigError
from megatext.stages import Stage, StageError, run_stages

Make = Callable[..., Stage]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A stage that notes its name in log.txt, runs some code, and writes a file of its own name."""

    def stage(name: str, code: str = "", needs: tuple[str, ...] = (), **options: object) -> Stage:
        output = tmp_path / "run" / name
        note = f"open({str(tmp_path / 'log.txt')!r}, 'a').write({name!r} + ' ')"
        script = f"{note}\n{code}\nopen({str(output)!r}, 'a').write('x')"
        return Stage(name, ("python", "-c", script), writes=(output,), needs=needs, **options)  # type: ignore[arg-type]

    return stage


def log(tmp_path: Path) -> list[str]:
    path = tmp_path / "log.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def run(tmp_path: Path, *stages: Stage) -> str:
    out = io.StringIO()
    try:
        run_stages(stages, tmp_path / "run", out)
    finally:
        text = out.getvalue()
    return text


def test_runs_in_order_once_and_prints_what_it_runs(tmp_path: Path, make: Make) -> None:
    stages = make("a"), replace(make("b"), environment=(("OMP_NUM_THREADS", "1"),))
    text = run(tmp_path, *stages)
    assert log(tmp_path) == ["a", "b"]
    assert "[ 1/2] a: elapsed 0:00, about 2:00 left" in text
    assert f"        $ {stages[0].shell()}" in text
    assert "$ OMP_NUM_THREADS=1 python -c" in text
    text = run(tmp_path, *stages)
    assert log(tmp_path) == []
    assert text.count("done before") == 2


def test_a_failing_stage_says_so_and_the_next_run_continues_there(tmp_path: Path, make: Make) -> None:
    flag = tmp_path / "flag"
    stages = make("a"), make("b", f"import os; assert os.path.exists({str(flag)!r})"), make("c")
    with pytest.raises(StageError, match=r"stage \[ 2/3\] b failed with exit status 1; .*run the same command again"):
        run(tmp_path, *stages)
    assert log(tmp_path) == ["a", "b"]
    flag.touch()
    text = run(tmp_path, *stages)
    assert log(tmp_path) == ["b", "c"]
    assert "[ 1/3] a: done before" in text
    assert "[ 2/3] b: was interrupted, starting it again" in text


@pytest.mark.parametrize("continues", [True, False])
def test_half_done_outputs_are_kept_only_where_the_command_continues_them(
    tmp_path: Path, make: Make, continues: bool
) -> None:
    output, flag = tmp_path / "run" / "a", tmp_path / "flag"
    code = f"import os; open({str(output)!r}, 'a').write('half '); assert os.path.exists({str(flag)!r})"
    stage = make("a", code, continues=continues)
    with pytest.raises(StageError):
        run(tmp_path, stage)
    flag.touch()
    text = run(tmp_path, stage)
    assert output.read_text() == ("half half x" if continues else "half x")
    assert ("continuing where it was interrupted" in text) == continues


def test_a_change_reruns_the_stage_and_what_needs_it(tmp_path: Path, make: Make) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("steps: 1")
    stages = [make("a", reads=(config,), continues=True), make("b"), make("c", needs=("a",))]
    run(tmp_path, *stages)
    assert log(tmp_path) == ["a", "b", "c"]
    config.write_text("steps: 2")
    text = run(tmp_path, *stages)
    assert log(tmp_path) == ["a", "c"]
    assert (tmp_path / "run" / "a").read_text() == "x"  # not appended to: another configuration's output is removed
    assert "its configuration or a stage before it changed" in text
    stages[1] = replace(stages[1], command=(*stages[1].command, "--option"))
    run(tmp_path, *stages)
    assert log(tmp_path) == ["b"]
    (tmp_path / "run" / "c").unlink()
    run(tmp_path, *stages)
    assert log(tmp_path) == ["c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import sys
from pathlib import Path
from megatext.stages import Stage, StageError, run_stages
sleep = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {{sleep!r}}])"
try:
    run_stages([Stage("sleep", ("python", "-c", launcher))], Path({str(tmp_path / "run")!r}))
except StageError as error:
    print(error)
    sys.exit(error.status)
"""
    # a test run in the background has Ctrl-C ignored, and what it starts inherits that
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="another run is at work"):
        run(tmp_path, Stage("sleep", ("python", "-c", "")))
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted in stage [ 1/1] sleep; run the same command again" in text
    # a launcher's rank is stopped with its launcher; a zombie is what an init that does not reap leaves of it
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((tmp_path / "pid").read_text())).status() == psutil.STATUS_ZOMBIE


def test_what_trainings_stand_on_is_not_replaced(tmp_path: Path, make: Make) -> None:
    first, second, then = make("a", root=True), make("b", root=True, needs=("a",)), make("c", needs=("b",))
    other = replace(first, facts=("another corpus",))
    run(tmp_path, first)
    run(tmp_path, other, second)  # nothing stands on it yet
    assert log(tmp_path) == ["a", "a", "b"]
    run(tmp_path, other, second, then)
    assert log(tmp_path) == ["c"]
    (tmp_path / "run" / "a").unlink()  # its own outputs may be gone
    for roots in (first, second), (other, replace(second, facts=("more",))):
        with pytest.raises(
            ConfigError, match="made from another input or with other options than(?s:.*)c stands on it"
        ):
            run(tmp_path, *roots, then)
    assert log(tmp_path) == [] and (tmp_path / "run" / "c").exists()
    run(tmp_path, other, second, then)  # the same again
    assert log(tmp_path) == ["a"]
    (tmp_path / "run" / "c").unlink()  # nothing is left to lose
    run(tmp_path, first, second, then)
    assert log(tmp_path) == ["a", "b", "c"]


def test_bad_stages_are_named(tmp_path: Path, make: Make) -> None:
    with pytest.raises(ConfigError, match=r"stage a: no such file: .*lm\.yaml"):
        run(tmp_path, make("a", reads=(tmp_path / "lm.yaml",)))
    with pytest.raises(StageError, match="cannot start no-such-program: No such file or directory; `make setup`"):
        run(tmp_path, Stage("a", ("no-such-program",)))
    with pytest.raises(StageError, match="did not write"):
        run(tmp_path, Stage("b", ("python", "-c", ""), writes=(tmp_path / "run" / "b",)))
    outside = tmp_path / "elsewhere"
    outside.touch()
    with pytest.raises(ConfigError, match="outside"):
        run(tmp_path, Stage("c", ("python", "-c", ""), writes=(outside,)))
    assert outside.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to .*file/stages"):
        run_stages([], tmp_path / "file")


def test_several_at_a_time_and_each_after_what_it_needs(tmp_path: Path, make: Make) -> None:
    """a and b each wait for the other to begin: one at a time they would wait for ever."""

    def meets(own: str, other: str) -> str:
        mine, theirs = (str(tmp_path / f"{name}.begun") for name in (own, other))
        return (
            f"import os, time; open({mine!r}, 'w').write('x'); until = time.time() + 30\n"
            f"while not os.path.exists({theirs!r}): assert time.time() < until; time.sleep(0.05)\nprint('met')"
        )

    stages = make("a", meets("a", "b")), make("b", meets("b", "a")), make("c", needs=("a", "b"))
    out = io.StringIO()
    run_stages(stages, tmp_path / "run", out, jobs=2)
    assert sorted(log(tmp_path)[:2]) == ["a", "b"] and (tmp_path / "run" / "logs" / "a.log").read_text() == "met\n"
    assert out.getvalue().count("done in") == 3


def test_what_does_not_need_a_failed_stage_is_still_run(tmp_path: Path, make: Make) -> None:
    stages = make("a", "assert False"), make("b"), make("c", needs=("a",)), make("d", needs=("b",))
    for jobs in (1, 2):
        with pytest.raises(StageError, match=r"stage \[ 1/4\] a failed"):
            run_stages(stages, tmp_path / "run", io.StringIO(), jobs=jobs, keep_going=True)
        assert log(tmp_path) == (["a", "b", "d"] if jobs == 1 else ["a"])


def test_interrupting_stops_all_that_run(tmp_path: Path) -> None:
    """As Ctrl-C does it, with two stages at work; none of their processes is left."""
    code = """
import os, signal, sys, threading, time
from pathlib import Path
from megatext.stages import Stage, StageError, run_stages
folder = Path(sys.argv[1])
def stage(name):
    script = f"import os, time; open('{folder}/{name}.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    return Stage(name, ("python", "-c", script), writes=(folder / name,))
def stop():
    while not all((folder / f"{name}.pid").exists() and (folder / f"{name}.pid").read_text() for name in "ab"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
try:
    run_stages([stage("a"), stage("b")], folder, jobs=2)
except StageError as error:
    print(error, error.status)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "interrupted in stage [ 1/2] a, [ 2/2] b" in done.stdout and done.stdout.strip().endswith("130")
    pids = [int((tmp_path / f"{name}.pid").read_text()) for name in "ab"]
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_a_stage_that_cannot_begin_leaves_none_behind(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    slow = Stage("slow", ("python", "-c", code))
    until = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)"
    stages = slow, Stage("first", ("python", "-c", until)), Stage("absent", ("no-such-program",), needs=("first",))
    with pytest.raises(StageError, match="cannot start no-such-program"):
        run_stages(stages, tmp_path / "run", io.StringIO(), jobs=2)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
