"""`python -m evaluation manifest|generate|score|compare|report|run`: from a task to a report.

Every stage reads and writes one --output directory and can be run alone; `run` chains them. What is already there
and made from the same inputs is not made again.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help answers at once because torch and transformers wait until they are needed
    from evaluation.manifest import Manifest

METRICS = "judge,rouge,bertscore,mauve"


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    from megatext.config import cli_errors

    # The loading reports and progress bars of transformers are noise between our own lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with cli_errors():
        _check_models(arguments)
        arguments.function(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description="Score continuations of text by any system."
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")

    def stage(name: str, function: Any, text: str, *parts: Any) -> None:
        sub = stages.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for part in parts:
            part(sub)
        sub.set_defaults(function=function)

    stage("manifest", _manifest, "choose documents, cut prefixes and targets", _task_options, _output_option)
    stage(
        "generate",
        _generate,
        "write every system's continuations",
        _output_option,
        _system_options,
        _judge_option,
        _device_option,
    )
    stage("score", _score, "measure what was written", _output_option, _judge_option, _score_options, _device_option)
    stage("compare", _compare, "paired differences of two systems", _compare_options)
    stage("report", _report, "HTML, plots, Markdown and CSV", _output_option, _report_options)
    stage(
        "run",
        _run,
        "all stages, one after the other",
        _task_options,
        _output_option,
        _system_options,
        _judge_option,
        _score_options,
        _report_options,
        _device_option,
    )
    return parser


def _output_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of all stages")


def _task_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", required=True, metavar="FILE", help="task file, or the name of a shipped one")
    sub.add_argument("--source", metavar="SOURCE", help="other documents: shards:DIR:SPLIT, a path, hf:NAME:SPLIT")
    sub.add_argument("--limit", type=int, metavar="N", help="no more than N samples, the first of the task's")


def _system_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--systems", type=Path, metavar="FILE", help="YAML list of {name, system, sampling}")
    sub.add_argument(
        "--system", action="append", default=[], metavar="NAME=SYSTEM", help="one more row, e.g. mine=jsonl:texts.jsonl"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of sampling")


def _judge_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--judge", type=Path, required=True, metavar="DIR", help="Hugging Face causal LM that judges")


def _score_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--featuriser", type=Path, metavar="DIR", help="model for BERTScore and MAUVE; the judge if not given"
    )
    sub.add_argument("--metrics", default=METRICS, help="what to measure")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of judge and featuriser")
    sub.add_argument("--bertscore-layer", type=int, metavar="N", help="hidden layer for BERTScore")
    sub.add_argument("--mauve-seeds", type=int, default=5, metavar="K", help="k-means seeds to average")


def _report_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--runs", type=Path, nargs="*", default=[], metavar="RUN_DIR", help="training runs whose curves to show"
    )
    sub.add_argument("--prompts", type=int, default=12, metavar="K", help="prompts to show side by side")


def _device_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cpu or cuda; a GPU if there is one")


def _compare_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("a", metavar="RESULTS:SYSTEM", help="output directory and row, e.g. runs/eval:dit")
    sub.add_argument("b", metavar="RESULTS:SYSTEM", help="the row to compare it with, of the same manifest")
    sub.add_argument("--seed", type=int, default=0, help="seed of the resampling")


def _check_models(arguments: argparse.Namespace) -> None:
    """Fail before the first text is written, not after an hour."""
    from megatext.config import ConfigError

    for option in ("judge", "featuriser"):
        directory = getattr(arguments, option, None)
        if directory is not None and not (directory / "config.json").is_file():
            raise ConfigError(f"--{option} {directory}: not a Hugging Face model directory (no config.json)")


def _device(arguments: argparse.Namespace) -> str:
    if arguments.device:
        return str(arguments.device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _manifest(arguments: argparse.Namespace) -> "Manifest":
    from evaluation.manifest import build_manifest, save_manifest
    from evaluation.tasks import load_task

    manifest = build_manifest(load_task(arguments.task, source=arguments.source, limit=arguments.limit))
    path = save_manifest(manifest, arguments.output)
    print(
        f"{path}: {len(manifest.samples)} samples of {manifest.task['documents']} documents, hash {manifest.hash[:12]}"
    )
    return manifest


def _generate(arguments: argparse.Namespace) -> None:
    from evaluation.generation import generate_all
    from evaluation.manifest import load_manifest
    from evaluation.systems import SystemEntry, complete, load_systems
    from megatext.config import ConfigError

    entries = load_systems(arguments.systems) if arguments.systems else []
    for text in arguments.system:
        name, equals, system = text.partition("=")
        if not equals:
            raise ConfigError(f"--system {text}: write NAME=SYSTEM")
        entries.append(SystemEntry(name, system))
    found = generate_all(
        load_manifest(arguments.output),
        complete(entries),
        output=arguments.output,
        seed=arguments.seed,
        judge_dir=arguments.judge,
        device=_device(arguments),
    )
    print(f"{arguments.output / 'generations.json'}: {', '.join(item.entry.name for item in found)}")


def _score(arguments: argparse.Namespace) -> None:
    print(f"\n{_scored(arguments)}\n")


def _scored(arguments: argparse.Namespace) -> str:
    from evaluation.generation import load_generations
    from evaluation.manifest import load_manifest
    from evaluation.scoring import ScoreConfig, score
    from evaluation.table import console_table

    manifest = load_manifest(arguments.output)
    config = ScoreConfig(
        judge=str(arguments.judge),
        featuriser=str(arguments.featuriser or arguments.judge),
        metrics=tuple(arguments.metrics.split(",")),
        dtype=arguments.dtype,
        bertscore_layer=arguments.bertscore_layer,
        mauve_seeds=tuple(range(25, 25 + arguments.mauve_seeds)),
    )
    generations = load_generations(arguments.output, manifest)
    return console_table(score(manifest, generations, config, arguments.output, device=_device(arguments)))


def _compare(arguments: argparse.Namespace) -> None:
    from evaluation.compare import compare, comparison_table

    (path_a, _, name_a), (path_b, _, name_b) = arguments.a.rpartition(":"), arguments.b.rpartition(":")
    print(comparison_table(compare((Path(path_a), name_a), (Path(path_b), name_b), seed=arguments.seed)))


def _report(arguments: argparse.Namespace) -> None:
    from evaluation.manifest import load_manifest
    from evaluation.report import write_report

    path = write_report(arguments.output, load_manifest(arguments.output), arguments.runs, prompts=arguments.prompts)
    print(f"report: {path}")


def _run(arguments: argparse.Namespace) -> None:
    _manifest(arguments)
    _generate(arguments)
    table = _scored(arguments)
    _report(arguments)
    print(f"\n{table}\n")


if __name__ == "__main__":
    main()
