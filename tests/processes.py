"""Trainings in processes of their own: several ranks of one, several one after another, and accidents to order."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_ranks(
    world: int, command: list[str], timeout: float = 1800, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a training command on `world` gloo processes; the output of all and the status of rank 0."""
    from megatext.training.engine import _free_port

    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    processes = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return subprocess.CompletedProcess(command, processes[0].returncode, "".join(outputs))


def run_all(world: int, commands: list[list[str]]) -> list[int]:
    """Run several training programs (a path or `-m module`, with arguments) one after another, each in processes of
    its own that are forked from `world` that have imported everything; rank 0's statuses.

    `--accident=step:N` kills the ranks in step N between the backward pass and the optimizer's step,
    `--accident=save:N` when half of a file of the checkpoint of step N is written.
    """
    from megatext.training.engine import _free_port

    with_ports = [[str(_free_port()), *command] for command in commands]
    finished = run_ranks(world, [sys.executable, "-m", "tests.processes", json.dumps(with_ports)])
    statuses = [int(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("STATUS ")]
    assert len(statuses) == len(commands), finished.stdout[-5000:]
    unexpected = [status for status in statuses if status not in (0, -9)]
    assert not unexpected, finished.stdout[-5000:]
    return statuses


def _main(commands: list[list[str]]) -> None:
    import runpy

    os.environ["DS_ACCELERATOR"] = "cpu"
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from megatext.training.engine import import_deepspeed

    import_deepspeed()
    for port, *command in commands:
        sys.stdout.flush()
        child = os.fork()
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if os.environ["RANK"] == "0":
                print(f"STATUS {status}", flush=True)
            continue
        os.environ["MASTER_PORT"] = port
        accident = [word.partition("=")[2] for word in command if word.startswith("--accident=")]
        if accident:
            _arrange(*accident[0].split(":"))
        sys.argv = [word for word in command if not word.startswith("--accident=")]
        try:
            if sys.argv[0] == "-m":
                sys.argv = sys.argv[1:]
                runpy.run_module(sys.argv[0], run_name="__main__")
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)


def _arrange(kind: str, number: str) -> None:
    import signal

    import torch

    from megatext.training.optimizer import MuonAdamW
    from megatext.training.trainer import Trainer

    if kind == "step":
        train_step, step = Trainer.train_step, MuonAdamW.step
        at = [0]

        def counted(self, *args):  # type: ignore[no-untyped-def]
            at[0] = self.state.step + 1
            train_step(self, *args)

        def deadly(self, *args, **options):  # type: ignore[no-untyped-def]
            if at[0] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **options)

        Trainer.train_step, MuonAdamW.step = counted, deadly  # type: ignore[method-assign]
    else:
        save = torch.save

        def half(content, path, *args, **options):  # type: ignore[no-untyped-def]
            save(content, path, *args, **options)
            if f"step-{int(number):08d}" in str(path) and "rank-" in Path(path).name:
                whole = Path(path).read_bytes()
                Path(path).write_bytes(whole[: len(whole) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
