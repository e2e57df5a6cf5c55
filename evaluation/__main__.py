"""`python -m evaluation manifest|generate|score|compare|compute|report|run`: from a task to a report.

Every stage reads and writes one --output directory and can be run alone; `run` chains them for one task or several.
What is already there and made from the same inputs is not made again.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help answers at once because torch and transformers wait until they are needed
    from evaluation.generation import Settings
    from evaluation.manifest import Manifest
    from evaluation.scoring import ScoreConfig
    from evaluation.systems import SystemEntry

METRICS = "rouge,bertscore,mauve,perplexity,diversity"
LARGE = "openai-community/gpt2-large"
ROBERTA = "FacebookAI/roberta-large"


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    from megatext.config import cli_errors

    # The loading reports and progress bars of transformers are noise between our own lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with cli_errors():
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

    generating = (_system_options, _judge_option)
    scoring = (_score_options, _judge_option)
    models = (_cache_option, _device_option, _dry_run_option)
    stage("manifest", _manifest, "choose documents, cut prefixes and targets", _one_task, _task_options, _output)
    stage("generate", _generate, "write every system's continuations", _output, *generating, *models)
    stage("score", _score, "measure what was written", _output, *scoring, *models)
    stage("compare", _compare, "paired differences from one system", _compare_options, _cache_option)
    stage("compute", _compute, "FLOPs over those of a baseline that writes as well", _output, _compute_options)
    stage("report", _report, "HTML, plots, Markdown and CSV", _output, _results_option, _report_options)
    stage(
        "run", _run, "all stages, for one task or several", _tasks, _task_options, _output, _system_options,
        *scoring, _report_options, *models,
    )  # fmt: skip
    return parser


def _output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of all stages")


_SOURCE = "other documents: a file, a folder, hf:NAME[:CONFIG]:SPLIT, shards:DIR:SPLIT"


def _one_task(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", required=True, metavar="TASK", help="task file, or the name of a shipped one")
    sub.add_argument("--source", metavar="SOURCE", help=_SOURCE)


def _tasks(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--task", required=True, action="append", metavar="TASK",
        help="task file, or the name of a shipped one; several are written to DIR/NAME each and share a report",
    )  # fmt: skip
    sub.add_argument("--source", action="append", metavar="SOURCE", help=f"{_SOURCE}; with several tasks one each")


def _task_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--reference-tokenizer", metavar="DIR", help="decides cuts instead of the task's")
    sub.add_argument("--limit", type=int, metavar="N", help="no more than N samples, the first of the task's")


def _system_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--systems", type=Path, metavar="FILE", help="YAML list of {name, system, sampling}")
    sub.add_argument(
        "--system", action="append", default=[], metavar="NAME=SYSTEM",
        help="one more row: model:DIR, hf:DIR, jsonl:FILE, python:MODULE:FUNCTION, or human, other, shuffled, repeat, "
        "empty",
    )  # fmt: skip
    sub.add_argument("--length", default="oracle", help="oracle (the human's), fixed:TOKENS, or free:TOKENS (at most)")
    sub.add_argument("--seed", type=int, default=0, help="seed of sampling")


def _judge_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--judge", metavar="MODEL",
        help="causal LM (directory or name) that scores perplexity and whose tokens the row `shuffled` shuffles "
        f"(default for scoring: {LARGE}; for generating: no row `shuffled`)",
    )  # fmt: skip


def _score_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--metrics", default=METRICS, help="what to measure")
    sub.add_argument("--featuriser", default=LARGE, metavar="MODEL", help="model for MAUVE, directory or name")
    sub.add_argument("--bertscore-model", default=ROBERTA, metavar="MODEL", help="model for BERTScore")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the models that score")
    sub.add_argument("--stem", action="store_true", help="ROUGE on Porter stems")
    sub.add_argument("--bertscore-layer", type=int, metavar="N", help="hidden layer for BERTScore")
    sub.add_argument("--bertscore-idf", action="store_true", help="weigh tokens by their rarity")
    sub.add_argument("--bertscore-baseline", type=Path, metavar="TSV", help="bert-score's baseline of the model")
    sub.add_argument("--mauve-seeds", type=int, default=10, metavar="K", help="k-means seeds to average")
    sub.add_argument("--mauve-text", choices=("continuation", "whole"), default="continuation", help="what it compares")


def _results_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="scored directories, a task each (default: --output, or the folders in it)",
    )


def _report_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--runs", type=Path, nargs="*", default=[], metavar="RUN_DIR", help="training runs whose curves to show"
    )
    sub.add_argument("--prompts", type=int, default=12, metavar="K", help="prompts to show side by side")


def _cache_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--cache", type=Path, metavar="DIR", help="texts, features and scores of before (default: cache in --output)"
    )


def _device_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cpu or cuda; a GPU if there is one")


def _dry_run_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dry-run", action="store_true", help="tell what is to be done and how long it may take; stop")


def _compare_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "rows", nargs="+", metavar="DIR:SYSTEM", help="output directory and row, e.g. runs/eval:dit; the last is the "
        "one that the others are compared with",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    sub.add_argument("--output", type=Path, metavar="FILE", help="write the differences as JSON, too")


def _compute_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--baseline",
        nargs="+",
        required=True,
        metavar="GROUP",
        help="groups of the baseline; those of equal FLOPs are one budget",
    )
    sub.add_argument("--show", nargs="+", metavar="ROW", help="these rows alone, as the table names them; default: all")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="NATS",
        help="how far from a system's entropy the baseline may be at its best, in the second column",
    )


def _device(arguments: argparse.Namespace) -> str:
    if arguments.device:
        return str(arguments.device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _manifest(arguments: argparse.Namespace) -> None:
    _build(arguments.task, arguments.source, arguments, arguments.output)


def _build(task: str, source: str | None, arguments: argparse.Namespace, output: Path) -> "Manifest":
    from evaluation.manifest import build_manifest, save_manifest, stored_manifest
    from evaluation.tasks import load_task

    config = load_task(task, source=source, tokenizer=arguments.reference_tokenizer, limit=arguments.limit)
    manifest = stored_manifest(config, output)
    if manifest is None:
        manifest = build_manifest(config)
        save_manifest(manifest, output)
    path = output / "manifest.jsonl"
    print(
        f"{path}: {len(manifest.samples)} samples of {manifest.task['documents']} documents, "
        f"{len(manifest.others)} others, hash {manifest.hash[:12]}"
    )
    return manifest


def _entries(arguments: argparse.Namespace) -> "list[SystemEntry]":
    from evaluation.systems import SystemEntry, complete, load_systems
    from megatext.config import ConfigError

    entries = load_systems(arguments.systems) if arguments.systems else []
    for text in arguments.system:
        name, equals, system = text.partition("=")
        if not equals:
            raise ConfigError(f"--system {text}: write NAME=SYSTEM")
        entries.append(SystemEntry(name, system))
    return complete(entries, arguments.judge)


def _settings(arguments: argparse.Namespace, output: Path) -> "Settings":
    from evaluation.generation import Settings
    from evaluation.hub import model_directory
    from evaluation.systems.base import Length

    return Settings(
        seed=arguments.seed,
        length=Length.parse(arguments.length),
        judge=model_directory(arguments.judge, "--judge") if arguments.judge else None,
        device=_device(arguments),
        cache=arguments.cache or output / "cache",
    )


def _score_config(arguments: argparse.Namespace) -> "ScoreConfig":
    from evaluation.scoring import ScoreConfig

    return ScoreConfig(
        metrics=tuple(name.strip() for name in arguments.metrics.split(",") if name.strip()),
        judge=arguments.judge or LARGE,
        featuriser=arguments.featuriser,
        bertscore_model=arguments.bertscore_model,
        dtype=arguments.dtype,
        stem=arguments.stem,
        bertscore_layer=arguments.bertscore_layer,
        bertscore_idf=arguments.bertscore_idf,
        bertscore_baseline=arguments.bertscore_baseline,
        mauve_seeds=tuple(range(25, 25 + arguments.mauve_seeds)),
        mauve_text=arguments.mauve_text,
    )


def _generate(arguments: argparse.Namespace) -> None:
    from evaluation.estimate import describe, plan_generation
    from evaluation.generation import generate_all
    from evaluation.manifest import load_manifest

    manifest, entries = load_manifest(arguments.output), _entries(arguments)
    settings = _settings(arguments, arguments.output)
    if arguments.dry_run:
        print(describe(plan_generation(manifest, entries, settings)))
        return
    found = generate_all(manifest, entries, settings, arguments.output)
    print(f"{arguments.output / 'generations.json'}: {', '.join(item.entry.name for item in found)}")


def _score(arguments: argparse.Namespace) -> None:
    from evaluation.estimate import describe, plan_scoring
    from evaluation.generation import load_generations
    from evaluation.manifest import load_manifest

    if arguments.dry_run:
        manifest = load_manifest(arguments.output)
        texts = [item.texts for item in load_generations(arguments.output, manifest)]
        cache = arguments.cache or arguments.output / "cache"
        print(describe(plan_scoring(manifest, texts, _score_config(arguments), cache, _device(arguments))))
        return
    print(f"\n{_scored(arguments, arguments.output)}\n")


def _scored(arguments: argparse.Namespace, output: Path) -> str:
    from evaluation.generation import load_generations
    from evaluation.manifest import load_manifest
    from evaluation.scoring import score
    from evaluation.table import console_table

    manifest, cache = load_manifest(output), arguments.cache or output / "cache"
    generations = load_generations(output, manifest)
    return console_table(
        score(manifest, generations, _score_config(arguments), output, cache=cache, device=_device(arguments))
    )


def _compare(arguments: argparse.Namespace) -> None:
    import json

    from evaluation.compare import compare, comparison_table
    from evaluation.files import atomic_write
    from megatext.config import ConfigError

    rows = []
    for text in arguments.rows:
        # Both may hold a colon: the directory is what is one.
        places = [i for i, letter in enumerate(text) if letter == ":" and 0 < i < len(text) - 1]
        cuts = [i for i in places if (Path(text[:i]) / "results.json").is_file()]
        if not cuts:
            raise ConfigError(f"{text}: write DIR:SYSTEM, e.g. runs/eval:dit, with a directory that was scored")
        rows.append((Path(text[: cuts[-1]]), text[cuts[-1] + 1 :]))
    if len(rows) < 2:
        raise ConfigError("compare needs two rows or more; the last is the one that the others are compared with")
    comparison = compare(rows, cache=arguments.cache, seed=arguments.seed)
    if arguments.output:
        atomic_write(arguments.output, json.dumps(comparison, indent=1) + "\n")
    print(comparison_table(comparison))


def _compute(arguments: argparse.Namespace) -> None:
    from evaluation.files import atomic_write
    from evaluation.multiplier import multiplier_table, multipliers
    from evaluation.plots import multiplier_plot
    from evaluation.scoring import load_results
    from megatext.config import ConfigError

    results = load_results(arguments.output)
    found = multipliers(results, arguments.baseline, arguments.tolerance)
    if arguments.show:
        names = [each.name for each in found]
        if absent := [name for name in arguments.show if name not in names]:
            raise ConfigError(f"--show {absent[0]}: no such row; there are: {'; '.join(names)}")
        found = [each for each in found if each.name in arguments.show]
    plot = arguments.output / "plots" / "multiplier.png"
    atomic_write(plot, multiplier_plot(results, arguments.baseline, found))
    print(f"{multiplier_table(found, arguments.tolerance)}\n{plot}")


def _report(arguments: argparse.Namespace) -> None:
    below = sorted(path.parent for path in arguments.output.glob("*/results.json"))
    own = (arguments.output / "results.json").exists() or not below
    _write_report(arguments.results or ([arguments.output] if own else below), arguments)


def _write_report(results: Sequence[Path], arguments: argparse.Namespace) -> None:
    from evaluation.report import write_report

    path = write_report(arguments.output, results, arguments.runs, prompts=arguments.prompts)
    print(f"report: {path}")


def _run(arguments: argparse.Namespace) -> None:
    from evaluation.estimate import describe, known_texts, plan_generation, plan_scoring
    from evaluation.generation import generate_all
    from evaluation.scoring import Models
    from evaluation.systems import open_system
    from evaluation.tasks import load_task
    from megatext.config import ConfigError

    entries, config = _entries(arguments), _score_config(arguments)
    sources = arguments.source or [None] * len(arguments.task)
    if len(sources) != len(arguments.task):
        raise ConfigError(f"{len(arguments.task)} tasks and {len(sources)} sources: give one --source for each --task")
    tasks = [load_task(task, limit=arguments.limit) for task in arguments.task]
    for task in tasks:  # a model that is missing is missed before the first document is read, not after an hour
        Models(config, task.n, "cpu")
    outputs = [arguments.output / task.name for task in tasks]
    if len(set(outputs)) < len(outputs):
        raise ConfigError("two tasks have one name: what is written of them would be one")
    manifests = [
        _build(name, source, arguments, output)
        for name, source, output in zip(arguments.task, sources, outputs, strict=True)
    ]
    settings = [_settings(arguments, output) for output in outputs]
    for manifest, own in zip(manifests, settings, strict=True):
        for entry in entries:
            open_system(entry, manifest, judge=own.judge)
    if arguments.dry_run:
        for manifest, own in zip(manifests, settings, strict=True):
            plan = plan_generation(manifest, entries, own)
            texts = known_texts(manifest, entries, own)
            print(describe(plan + plan_scoring(manifest, texts, config, own.cache, own.device)))
        return
    tables = []
    for manifest, own, output in zip(manifests, settings, outputs, strict=True):
        generate_all(manifest, entries, own, output)
        tables.append(_scored(arguments, output))
    _write_report(outputs, arguments)
    print("\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
