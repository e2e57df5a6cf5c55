"""launch/slurm/pretrain.sbatch under stand-ins for srun and scontrol."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY
from tests.training import toy

SCRIPT = REPOSITORY / "launch" / "slurm" / "pretrain.sbatch"
SRUN = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
assert [arguments.pop(0), arguments.pop(0)] == ["--kill-on-bad-exit=1", "--cpus-per-task=1"]
tasks = [
    subprocess.Popen(arguments, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {calls}
[ "$1" = show ] && printf 'localhost\\nother\\n'
exit 0
"""


def submit(folder: Path, job: int, *options: str) -> tuple[int, str, str]:
    """The job's status, its output, and what scontrol was asked for."""
    bin_folder, calls = folder / "bin", folder / f"calls-{job}"
    bin_folder.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL.format(calls=calls))):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "localhost,other", "SLURM_NTASKS": "2"}
    # without what a process group of this process has left there
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    environment = own | slurm | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""


@pytest.mark.dist
def test_a_job_is_queued_again_until_it_is_finished(tmp_path: Path) -> None:
    toy.write_toy_config(tmp_path)
    job = os.getpid() % 20000
    stopped = toy.command(tmp_path, "run", signal_at_step=4, signal_number=10, accident_rank=1)
    status, output, calls = submit(tmp_path, job, *stopped)
    assert status == 75 and f"requeue {job}" in calls, output
    assert "stopped by a signal after step 4" in output
    status, output, calls = submit(tmp_path, job + 1, *toy.command(tmp_path, "run"))
    assert status == 0 and "requeue" not in calls, output
    assert "at step 4" in output and json.loads((tmp_path / "run" / "finished.json").read_text())["step"] == 10


def test_a_job_that_failed_is_not_queued_again(tmp_path: Path) -> None:
    toy.write_toy_config(tmp_path)
    status, output, calls = submit(tmp_path, os.getpid() % 20000, *toy.command(tmp_path, "run"), "--no.such=1")
    assert status == 1 and "requeue" not in calls and "unknown key" in output


def test_the_margin_is_given_to_the_tasks() -> None:
    """USR1, to the tasks (not `B:`, the batch shell), early enough to finish a step and save."""
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@600" in lines and "#SBATCH --requeue" in lines


def test_colas_stages_wait_for_each_other(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwc -l < {tmp_path}/calls\n')
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "8", "PYTHON": "python"}
    command = ["bash", "launch/slurm/cola.sh", "vae_1gpu", "dit_1gpu", "--time=1:00:00", "--", "--seed", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "queued: 1 (stage 1), 2 (its export), 3 (stage 2), 4 (its export)\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--dependency" in call for call in calls] == [False, True, True, True]
    for number, (call, part) in enumerate(
        zip(calls, ("pretrain_vae", "vae_1gpu", "pretrain_cola", "dit_1gpu"), strict=True)
    ):
        assert part in call and (number == 0 or f"--dependency=afterok:{number} " in call)
    for call in calls[::2]:  # what they name is there
        assert "--nodes 8 --time=1:00:00 launch/slurm/pretrain.sbatch" in call and call.endswith(" --seed 1")
        assert all((REPOSITORY / word).is_file() for word in call.split() if "/" in word)
    assert all("--time=1:00:00 --nodes 1 --ntasks 1 " in call and "--seed" not in call for call in calls[1::2])
    assert "--output runs/cola/models/vae_1gpu" in calls[1]
    assert "vae: runs/cola/models/vae_1gpu\n" in (REPOSITORY / "launch/configs/cola/dit_1gpu.yaml").read_text()


@pytest.mark.dist
def test_a_job_of_an_array_takes_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    toy.write_toy_config(folder)
    lines = ["not this one", shlex.join(toy.command(folder, "run", max_steps=2))]
    (folder / "commands.txt").write_text("".join(line + "\n" for line in lines))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    status, output, _ = submit(tmp_path, os.getpid() % 20000, str(folder / "commands.txt"))
    assert status == 0 and json.loads((folder / "run" / "finished.json").read_text())["step"] == 2, output


def test_a_job_without_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "commands.txt").write_text("one\n")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    status, output, _ = submit(tmp_path, 1, str(tmp_path / "commands.txt"))
    assert status == 1 and "commands.txt has no line 1, counted from 0" in output
