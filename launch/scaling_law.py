"""A family of runs from one file: plan them, launch them, collect what they measured, fit the laws, plot.

python launch/scaling_law.py plan|launch|collect|fit|plot --config launch/configs/scaling/FILE.yaml
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatext.config import cli_errors  # noqa: E402
from megatext.scaling.collect import collect, from_folder, from_wandb, read_points, write_points  # noqa: E402
from megatext.scaling.config import load_plan_config  # noqa: E402
from megatext.scaling.plan import Plan, read_plan  # noqa: E402
from megatext.scaling.runs import export_models, is_finished, run_here, stages, submit  # noqa: E402


def plan_runs(options: argparse.Namespace) -> None:
    """The runs and what they cost; a configuration each."""
    plan = Plan(options.config)
    print(plan.table(), flush=True)
    plan.refuse_what_does_not_fit()
    plan.write()
    print(f"a configuration for each: {plan.work_dir / 'configs'}")


def launch_runs(options: argparse.Namespace) -> None:
    """Run what is not finished, export what is."""
    config, runs = read_plan(options.config)
    jobs = max(1, options.jobs)
    if options.list:
        print("\n".join(stage.shell() for stage in stages(runs, config, jobs)))
        return
    try:
        if options.slurm is not None:
            print(submit(runs, config, options.slurm))
        else:
            run_here(runs, config, jobs)
    finally:  # a run that failed keeps no other back
        systems = export_models(runs, config)
        finished = sum(map(is_finished, runs))
        print(f"{finished} of {len(runs)} runs are finished and exported; for the evaluation: {systems}")


def collect_points(options: argparse.Namespace) -> None:
    """What was measured -> points.json"""
    config, runs = read_plan(options.config)
    work_dir = Path(config.work_dir)
    records = from_wandb(options.wandb, work_dir.name) if options.wandb else from_folder
    points = collect(runs, records, work_dir / "models", options.results)
    finished = sum(point.final for point in points)
    print(f"{finished} of {len(runs)} runs are finished; {len(points)} points: {write_points(points, work_dir)}")


def fit_laws(options: argparse.Namespace) -> None:
    """Laws with intervals -> fits.json"""
    from megatext.scaling.summary import summarise, table, write_summary

    config, _ = load_plan_config(options.config)
    summary = summarise(read_points(Path(config.work_dir)), config.parameters)
    print(f"{table(summary)}\n\n{write_summary(summary, Path(config.work_dir))}")


def plot_laws(options: argparse.Namespace) -> None:
    """Points and laws -> plots/*.png and report.html"""
    from megatext.scaling import plots
    from megatext.scaling.summary import read_summary

    work_dir = Path(load_plan_config(options.config)[0].work_dir)
    print(plots.write(read_points(work_dir), read_summary(work_dir), work_dir))


COMMANDS = {"plan": plan_runs, "launch": launch_runs, "collect": collect_points, "fit": fit_laws, "plot": plot_laws}


def main() -> None:
    """Parse, and run a stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    of = {
        name: subparsers.add_parser(name, help=run.__doc__, description=run.__doc__) for name, run in COMMANDS.items()
    }
    for command in of.values():
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="of launch/configs/scaling")
    of["launch"].add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; they share the machine")
    of["launch"].add_argument(
        "--slurm", nargs=argparse.REMAINDER, metavar="OPTION", help="submit an array; what follows is sbatch's"
    )
    of["launch"].add_argument("--list", action="store_true", help="print the commands and stop")
    of["collect"].add_argument(
        "--wandb", metavar="ENTITY/PROJECT", help="read from there, not from the runs' directories"
    )
    of["collect"].add_argument("--results", type=Path, nargs="+", default=[], metavar="DIR", help="of the evaluation")
    options = parser.parse_args()
    if options.config.is_file():
        options.config = options.config.resolve()
    os.chdir(ROOT)  # the presets' paths start at the root of the repository
    with cli_errors():
        COMMANDS[options.command](options)


if __name__ == "__main__":
    main()
