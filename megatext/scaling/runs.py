"""The planned runs, run: here, some at a time, or as a SLURM array. What is finished is never run again."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.files import atomic_write
from megatext.config import ConfigError
from megatext.export import export
from megatext.scaling.config import PlanConfig
from megatext.scaling.plan import PlannedRun, config_file
from megatext.stages import Stage, run_or_exit, share_of_threads

SCRIPT = "launch/slurm/pretrain.sbatch"
COMMANDS = "commands.txt"


def is_finished(run: PlannedRun) -> bool:
    """Whether it has come to its last step and measured itself."""
    try:
        return bool(json.loads((Path(run.run_dir) / "finished.json").read_text())["step"] == run.steps)
    except (OSError, ValueError, KeyError):
        return False


def options(run: PlannedRun, config: PlanConfig) -> list[str]:
    """The launcher and what it is told."""
    words = [f"launch/pretrain_{run.launcher}.py", "--config", str(config_file(run))]
    given = config.device.deepspeed_config
    return [*words, "--deepspeed_config", given] if given else words


def stages(runs: Sequence[PlannedRun], config: PlanConfig, jobs: int) -> list[Stage]:
    """A stage for each unfinished run; a run that was interrupted continues from its newest checkpoint."""
    launcher = ["deepspeed", "--quiet", "--num_gpus", str(config.device.processes)]
    return [
        Stage(
            run.name,
            command=(*launcher, *options(run, config)),
            reads=(config_file(run),),
            # only this: the runner removes what others have left, and a checkpoint from elsewhere is to be continued
            writes=(Path(run.run_dir) / "finished.json",),
            continues=True,
            environment=share_of_threads(jobs * config.device.processes),
            expected_seconds=run.device_hours * 3600 if run.device_hours else run.flops / 1e10,
        )
        for run in runs
        if not is_finished(run)
    ]


def run_here(runs: Sequence[PlannedRun], config: PlanConfig, jobs: int) -> None:
    """Run what is not finished, `jobs` at a time; a run that fails does not stop the others; after them it ends
    the program.

    Raises ConfigError for several jobs where they would meet: DeepSpeed's launcher takes the first accelerators, and
    one port for the ranks of a run.
    """
    if jobs > 1 and (torch.accelerator.is_available() or config.device.processes > 1):
        raise ConfigError("--jobs is for runs of one process on CPUs; device.processes spreads a run over accelerators")
    to_do = stages(runs, config, jobs)
    print(f"{len(runs) - len(to_do)} of {len(runs)} runs are finished", flush=True)
    run_or_exit(to_do, Path(config.work_dir), jobs=jobs, keep_going=True)


def submit(runs: Sequence[PlannedRun], config: PlanConfig, sbatch_options: Sequence[str]) -> str:
    """Submit what is not finished as one array, a job a run; what sbatch answered. Raises ConfigError.

    Each job asks for more time until its run is finished. A plan that has jobs in the queue is not submitted again: two
    jobs would train one run.
    """
    name = f"megatext-{Path(config.work_dir).name}"
    queued = _slurm(["squeue", "--noheader", "--me", "--name", name, "--format", "%i"])
    if queued:
        raise ConfigError(
            f"jobs of this plan are queued or running ({queued}); wait for them, or scancel --name {name}"
        )
    processes, a_node = config.device.processes, config.device.processes_per_node
    if processes > a_node and processes % a_node:
        raise ConfigError(f"device.processes {processes} do not fill nodes of device.processes_per_node {a_node}")
    tasks = min(processes, a_node)
    waiting = [number for number, run in enumerate(runs) if not is_finished(run)]
    if not waiting:
        return f"all {len(runs)} runs are finished"
    commands = Path(config.work_dir) / COMMANDS
    atomic_write(commands, "".join(shlex.join(options(run, config)) + "\n" for run in runs))
    array = ["--job-name", name, "--array", ",".join(map(str, waiting)), "--nodes", str(processes // tasks)]
    array += ["--ntasks-per-node", str(tasks), "--gpus-per-node", str(tasks), *sbatch_options]
    return _slurm(["sbatch", *array, SCRIPT, str(commands)])


def _slurm(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]}: {error.strerror}; is this a SLURM machine?") from None
    if done.returncode:
        raise ConfigError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return ", ".join(done.stdout.split("\n")).strip(", ")


def export_models(runs: Sequence[PlannedRun], config: PlanConfig) -> Path:
    """Export every finished run to models/, and write systems.yaml, which the evaluation can be given; its path."""
    work_dir = Path(config.work_dir)
    rows = []
    for run in filter(is_finished, runs):
        model = work_dir / "models" / run.name
        if not model.is_dir():
            unfinished = model.with_name(f".unfinished-{model.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            export(Path(run.run_dir), unfinished)
            unfinished.rename(model)
        kind = "hf" if run.launcher == "lm" else "model"
        for way in config.systems[run.system].sampling:
            told = " ".join([run.name, *(f"{key}={value}" for key, value in way.items())])
            rows.append({"name": told, "system": f"{kind}:{model}", "sampling": way, "group": run.name})
    path = work_dir / "systems.yaml"
    atomic_write(path, json.dumps(rows, indent=1) + "\n")
    return path
