"""Manifests: prefixes and targets fixed once, as text, for every system. Their hash goes into every result."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.files import atomic_write, hash_of_file, read_jsonl
from evaluation.tasks import Pool, TaskConfig, open_pool
from megatext.config import ConfigError
from megatext.data import DataError

_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Sample:
    """One continuation to write. prefix + target is the (cut) document, character by character."""

    id: str
    """Stable name of the document in its source."""
    prefix: str
    """What a system is given."""
    target: str
    """What the human wrote next."""
    text_sha256: str
    """Hash of prefix + target."""
    n_ref_tokens: int
    """Tokens of prefix + target by the reference tokenizer."""
    n_ref_target_tokens: int
    """Tokens of the target by the reference tokenizer."""
    split_fraction: float
    """Share of the tokens asked for in the prefix."""


@dataclass(frozen=True)
class Manifest:
    """Samples in the order of their hash rank, so the first k are what a task with n = k would hold."""

    samples: tuple[Sample, ...]
    hash: str
    """sha256 of the JSONL file."""
    task: dict[str, Any]
    """The task's configuration and what its selection saw (documents, passed over)."""


def build_manifest(task: TaskConfig) -> Manifest:
    """Choose task.n documents and cut each. Raises ConfigError with counts if too few are long enough."""
    pool = open_pool(task.source)
    cut = _cutter(task, pool)
    order = sorted(range(len(pool.ids)), key=lambda i: _digest(f"{task.seed}|{task.name}|{pool.ids[i]}"))
    samples: list[Sample] = []
    passed_over = 0
    for index in order:
        if len(samples) == task.n:
            break
        if pool.lengths is not None and pool.lengths[index] < task.min_tokens:
            passed_over += 1
            continue
        share = int(_digest(f"{task.seed}|split|{task.name}|{pool.ids[index]}")[:13], 16) / 16**13
        low, high = task.split_fraction
        fraction = low + (high - low) * share
        pieces = cut(pool.read(index), fraction)
        if pieces is None:
            passed_over += 1
            continue
        prefix, target, n_tokens, n_target = pieces
        digest = hashlib.sha256((prefix + target).encode()).hexdigest()
        samples.append(Sample(pool.ids[index], prefix, target, digest, n_tokens, n_target, round(fraction, 6)))
    if len(samples) < task.n:
        raise ConfigError(
            f"task {task.name}: n is {task.n}, but only {len(samples)} of {len(pool.ids)} documents of "
            f"{task.source} have {task.min_tokens} tokens or more; lower n (--limit {len(samples)}) or min_tokens, "
            "or give more text"
        )
    seen = {"documents": len(pool.ids), "passed_over": passed_over}
    lines = _lines(samples)
    return Manifest(tuple(samples), hashlib.sha256(lines.encode()).hexdigest(), {**asdict(task), **seen})


def save_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write `manifest.jsonl` (a sample a line) and `manifest.json` (task, counts, hash)."""
    path = directory / "manifest.jsonl"
    atomic_write(path, _lines(manifest.samples))
    atomic_write(directory / "manifest.json", json.dumps({"hash": manifest.hash, **manifest.task}, indent=1) + "\n")
    return path


def load_manifest(path: Path) -> Manifest:
    """Read a manifest (file or directory); the hash is computed anew."""
    path = path / "manifest.jsonl" if path.is_dir() else path
    try:
        samples = tuple(Sample(**record) for record in read_jsonl(path))
    except TypeError as error:
        raise DataError(f"{path}: not a manifest: {error}") from None
    if not samples:
        raise DataError(f"{path}: holds no samples")
    beside = path.with_suffix(".json")
    task = json.loads(beside.read_text()) if beside.exists() else {"name": path.stem}
    return Manifest(samples, hash_of_file(path), {key: value for key, value in task.items() if key != "hash"})


def _lines(samples: list[Sample] | tuple[Sample, ...]) -> str:
    return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


Cut = tuple[str, str, int, int]


def _cutter(task: TaskConfig, pool: Pool) -> Callable[[str | list[int], float], Cut | None]:
    """document, fraction -> (prefix, target, tokens, target tokens), or None for a document to pass over.

    The split is a place in the text: decoding two halves of the ids on their own would break characters
    that byte-level tokenizers spread over several tokens.
    """
    if task.reference_tokenizer is None and pool.tokenizer is None:

        def cut_words(document: str | list[int], fraction: float) -> Cut | None:
            assert isinstance(document, str)
            ends = [match.end() for match in _WORD.finditer(document)][: task.max_tokens]
            if len(ends) < task.min_tokens:
                return None
            k = _split_point(len(ends), fraction)
            return document[: ends[k - 1]], document[ends[k - 1] : ends[-1]], len(ends), len(ends) - k

        return cut_words

    if task.reference_tokenizer is None:
        tokenizer = pool.tokenizer
    else:
        from megatext.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(task.reference_tokenizer)
    same = pool.tokenizer is not None and tokenizer.fingerprint() == pool.tokenizer.fingerprint()

    def cut_tokens(document: str | list[int], fraction: float) -> Cut | None:
        if isinstance(document, str):
            ids = tokenizer.encode(document)
        else:
            ids = document if same else tokenizer.encode(pool.tokenizer.decode(document))
        ids = ids[: task.max_tokens]
        text = tokenizer.decode(ids)
        while text.endswith("\ufffd") and ids:  # the cut fell inside a character
            ids = ids[:-1]
            text = tokenizer.decode(ids)
        if len(ids) < task.min_tokens:
            return None
        for k in range(_split_point(len(ids), fraction), len(ids)):
            prefix = tokenizer.decode(ids[:k])
            if text.startswith(prefix):  # false inside a character of several tokens: move on to its end
                target = text[len(prefix) :]
                return (prefix, target, len(ids), len(ids) - k) if prefix.strip() and target.strip() else None
        return None

    return cut_tokens


def _split_point(n_tokens: int, fraction: float) -> int:
    return min(max(round(fraction * n_tokens), 1), n_tokens - 1)
