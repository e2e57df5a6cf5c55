"""Manifests: prefixes and targets fixed once, as text, for every system. Their hash goes into every result."""

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.files import atomic_write, hash_of, read_jsonl
from evaluation.hub import offline_hint
from evaluation.tasks import Pool, TaskConfig, open_pool, stamp_of
from megatext.config import ConfigError
from megatext.data import DataError

FORMAT = 2
_WORD = re.compile(r"\s*\S+")
_CHARACTERS_PER_TOKEN = 64
"""Of a book no more is tokenized than can hold the tokens that are kept."""


@dataclass(frozen=True)
class Sample:
    """One continuation to write. prefix + target is the beginning of the document, character by character."""

    id: str
    """Stable name of the document in its source."""
    prefix: str
    """What a system is given: characters 0 to `split` of the document."""
    target: str
    """What the human wrote next: characters `split` to `end`."""
    split: int
    """Where the target begins in the document, in characters."""
    end: int
    """Where the document was cut, in characters."""
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
    others: tuple[Sample, ...]
    """As many of the documents that rank next: human text for the same task, but none of these samples. Empty where
    the source has too few documents."""
    hash: str
    """sha256 over everything that decides what a number means: the cuts' rules, samples, and others."""
    task: dict[str, Any]
    """The task's configuration and what its selection saw (documents, passed over, letters that are not ASCII)."""


def build_manifest(task: TaskConfig) -> Manifest:
    """Choose task.n documents, and n more for `others`, and cut each. Raises ConfigError with counts if too few are
    long enough."""
    pool = open_pool(task)
    stamp = stamp_of(task)
    cut, fingerprint = _cutter(task, pool)
    chosen: list[Sample] = []
    passed_over = 0
    for index, text in _ranked(pool, task):
        if len(chosen) == 2 * task.n:
            break
        share = int(_digest(f"{task.seed}|split|{task.name}|{pool.ids[index]}")[:13], 16) / 16**13
        low, high = task.split_fraction
        fraction = low + (high - low) * share
        pieces = cut(text, fraction)
        if pieces is None:
            passed_over += len(chosen) < task.n
            continue
        split, end, n_tokens, n_target = pieces
        digest = hashlib.sha256(text[:end].encode()).hexdigest()
        chosen.append(
            Sample(
                pool.ids[index], text[:split], text[split:end], split, end, digest, n_tokens, n_target,
                round(fraction, 6),
            )
        )  # fmt: skip
    if len(chosen) < task.n:
        raise ConfigError(
            f"task {task.name}: n is {task.n}, but only {len(chosen)} of {len(pool.ids)} documents of "
            f"{task.source} have {task.min_tokens} tokens or more; lower n (--limit {len(chosen)}) or min_tokens, "
            "or give more text"
        )
    samples = tuple(chosen[: task.n])
    others = tuple(chosen[task.n :]) if len(chosen) == 2 * task.n else ()
    facts: dict[str, Any] = {
        **asdict(task),
        "reference_fingerprint": fingerprint,
        "source_stamp": stamp,
        "documents": len(pool.ids),
        "passed_over": passed_over,
        "non_ascii_letters": _non_ascii(samples),
    }
    facts["split_fraction"] = list(task.split_fraction)  # as JSON has it
    return Manifest(samples, others, _hash(facts, samples, others), facts)


def _ranked(pool: Pool, task: TaskConfig) -> Iterator[tuple[int, str]]:
    """(place, text) of the documents by the rank of their hashes; texts are read in lots, as many as are needed."""
    lot, given = 3 * task.n + 100, 0
    while given < len(pool.ids):
        ranks = heapq.nsmallest(
            given + lot, range(len(pool.ids)), key=lambda i: _digest(f"{task.seed}|{task.name}|{pool.ids[i]}")
        )[given:]
        yield from zip(ranks, pool.read(ranks), strict=True)
        given += len(ranks)
        lot *= 4


def save_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write `manifest.jsonl` (a sample a line), `others.jsonl`, and `manifest.json` (task, counts, hash) last."""
    path = directory / "manifest.jsonl"
    for file, samples in ((path, manifest.samples), (directory / "others.jsonl", manifest.others)):
        atomic_write(file, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))
    atomic_write(directory / "manifest.json", json.dumps({"hash": manifest.hash, **manifest.task}, indent=1) + "\n")
    return path


def stored_manifest(task: TaskConfig, directory: Path) -> Manifest | None:
    """The manifest of `directory` if it was made from this task and its source looks as it did, else None."""
    try:
        manifest = load_manifest(directory)
        wanted = json.loads(json.dumps({**asdict(task), "source_stamp": stamp_of(task)}))
        if task.reference_tokenizer is not None:
            wanted["reference_fingerprint"] = _token_ends(task, None)[1]
    except (DataError, OSError):
        return None
    return manifest if all(manifest.task.get(key) == value for key, value in wanted.items()) else None


def load_manifest(directory: Path) -> Manifest:
    """Read what `save_manifest` wrote. Raises DataError if it is missing, or was changed since its hash was taken."""
    path = directory / "manifest.json"
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob("*/manifest.json"))
        where = f"; there are manifests in {', '.join(inside)}" if inside else ""
        raise DataError(f"{path}: no such file; run `python -m evaluation manifest --output {directory}` first{where}")
    task = json.loads(path.read_text())
    try:
        samples, others = (
            tuple(Sample(**record) for record in read_jsonl(directory / name))
            for name in ("manifest.jsonl", "others.jsonl")
        )
        expected = task.pop("hash")
        found = _hash(task, samples, others)
    except (TypeError, KeyError) as error:
        raise DataError(f"{directory}: not a manifest of this version ({error}); make it again") from None
    if found != expected:
        raise DataError(
            f"{directory}: the manifest was changed by hand: its hash is {found[:12]}, not {expected[:12]}; "
            "make it again (a task of your own is a YAML file)"
        )
    return Manifest(samples, others, found, task)


def _hash(task: dict[str, Any], samples: tuple[Sample, ...], others: tuple[Sample, ...]) -> str:
    """Where the documents lay and how the tokenizer was called is left out: the texts and its fingerprint are in."""
    rules = ("name", "n", "seed", "min_tokens", "max_tokens", "split_fraction", "reference_fingerprint")
    texts = [[asdict(sample) for sample in several] for several in (samples, others)]
    return hash_of([FORMAT, {key: task[key] for key in rules}, texts])


def _non_ascii(samples: tuple[Sample, ...]) -> float:
    """Share of the targets' letters that ROUGE's tokenizer does not know."""
    letters = [letter for sample in samples for letter in sample.target if letter.isalpha()]
    return round(sum(not letter.isascii() for letter in letters) / max(1, len(letters)), 6)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


Cut = tuple[int, int, int, int]


def _cutter(task: TaskConfig, pool: Pool) -> tuple[Callable[[str, float], Cut | None], str]:
    """(document, fraction) -> (split, end, tokens, target tokens), None for a document to pass over; and what cuts.

    Cut and split are places in the text: decoding two halves of the ids on their own would break characters that
    byte-level tokenizers spread over several tokens.
    """
    ends, fingerprint = _token_ends(task, pool)

    def cut(document: str, fraction: float) -> Cut | None:
        most = _CHARACTERS_PER_TOKEN * task.max_tokens
        places = ends(document[:most])
        if len(places) <= task.max_tokens and len(document) > most:
            places = ends(document)
        places = places[: task.max_tokens]
        if len(places) < task.min_tokens:
            return None
        k = min(max(round(fraction * len(places)), 1), len(places) - 1)
        split, end = places[k - 1], places[-1]
        if not document[:split].strip() or not document[split:end].strip():
            return None
        return split, end, len(places), len(places) - k

    return cut, fingerprint


def _token_ends(task: TaskConfig, pool: Pool | None) -> tuple[Callable[[str], list[int]], str]:
    name = task.reference_tokenizer or (pool.tokenizer if pool else None)
    if name is None:
        return lambda text: [match.end() for match in _WORD.finditer(text)], "words"
    from megatext.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        hint = offline_hint("--reference-tokenizer DIR, or null in a task file for words between white space")
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"task {task.name}: reference_tokenizer {name} cannot be loaded ({reason}){hint}") from None
    return lambda text: tokenizer.encode_with_ends(text)[1], tokenizer.fingerprint()
