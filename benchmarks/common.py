"""What every benchmark here shares: alternating runs, a table, and one JSON object as the last line.

Machines are noisy, so contestants take turns, the best of several runs counts, and what is quoted are ratios.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatext.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, ShardWriter, write_json
from megatext.tokenizer import Tokenizer


def rounds(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The figures of each contestant in `repeats` rounds; in every round all of them run once."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            figures[name].append(run())
    return figures


def best_of(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The highest figure that each contestant reached in `rounds`."""
    return {name: max(figures) for name, figures in rounds(contestants, repeats).items()}


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: dict[str, Any]) -> None:
    """Print a table, then `figures` with the machine's name as one line of JSON."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    machine = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(json.dumps({"benchmark": title, **figures, "machine": machine}), flush=True)


def documents(count: int, mean: float, seed: int, vocab_size: int = 50_000) -> Iterator[np.ndarray]:
    """Random tokens with the lengths of web text: log-normal, most of them short, some very long."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(mean) - 0.5, 1.0, count), 8, 60_000).astype(int)
    for length in lengths:
        yield generator.integers(3, vocab_size, length, dtype=np.uint16)


def write_shards(
    folder: Path, texts: Iterable[np.ndarray], shard_tokens: int = 10_000_000, tokenizer: Tokenizer | None = None
) -> int:
    """Shards as data_tools.shard writes them; their tokens."""
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    writer = None
    for number, tokens in enumerate(texts):
        writer = writer or ShardWriter(folder / f"train-{len(entries):06d}.tar")
        writer.add(f"document-{number:09d}", {"tokens": tokens}, {"n_tokens": len(tokens)}, len(tokens))
        if writer.tokens >= shard_tokens:
            entries.append(writer.close())
            writer = None
    if writer is not None:
        entries.append(writer.close())
    total = {
        key: sum(entry[name] for entry in entries) for key, name in (("documents", "samples"), ("tokens", "tokens"))
    }
    identity: dict[str, Any] = {"fingerprint": "benchmark", "vocab_size": 50_000, "eos_id": 2}
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER_FOLDER)
        identity = {"fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size, "eos_id": 2}
    splits = {"train": {**total, "shards": entries}}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "tokenizer": identity, "splits": splits})
    return int(total["tokens"])


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
