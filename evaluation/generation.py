"""The generate stage: texts of every system, cached by content and written so that a kill loses at most a batch."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.files import append_jsonl, atomic_write, hash_of, read_log
from evaluation.manifest import Manifest
from evaluation.systems import Request, SystemEntry, Writer, open_writer, request_seed
from megatext.data import DataError


@dataclass(frozen=True)
class Generations:
    """One system's texts in the manifest's order, and what is recorded of how they came about."""

    entry: SystemEntry
    """The row of the systems file."""
    fingerprint: str
    """What wrote, by content: weights, tokenizer, sampling, code."""
    weights: str | None
    """Hash of the model directory; None for rows without one."""
    started_from: str | None
    """Hash of the model its training started from; None where it started from random weights."""
    manifest: str
    """Hash of the manifest the texts belong to."""
    seed: int
    """Seed of the run."""
    texts: list[str]
    """A continuation for each sample."""
    ids: list[list[int]] | None
    """Token ids to score instead of the encoded texts (shuffled tokens)."""
    ids_tokenizer: str | None
    """Fingerprint of the tokenizer of `ids`."""
    seconds_per_sample: float | None
    """Mean wall time of a text within its batch; None where it means nothing."""
    unconditional: list[str]
    """Passages written without a prefix."""


def generate(
    manifest: Manifest,
    entry: SystemEntry,
    *,
    output: Path,
    seed: int,
    judge_dir: Path | None = None,
    device: str = "cpu",
) -> Generations:
    """Write what is missing of a system's texts under output/cache/generations and return all of them."""
    writer = open_writer(entry, manifest, judge_dir=judge_dir, device=device)
    requests = [
        Request(sample.id, sample.prefix, writer.target_tokens(sample), request_seed(seed, "continuation", sample.id))
        for sample in manifest.samples
    ]
    records = _written(writer, entry, manifest, requests, "continuation", output, seed)
    length = entry.unconditional_tokens or int(manifest.task.get("max_tokens", 64))
    free = [
        Request(str(i), "", length, request_seed(seed, "unconditional", str(i))) for i in range(entry.unconditional)
    ]
    passages = (
        _written(writer, entry, manifest, free, f"unconditional-{length}", output, seed)
        if free and writer.timed
        else []
    )
    seconds = [record["seconds"] for record in records]
    return Generations(
        entry=entry,
        fingerprint=writer.fingerprint,
        weights=writer.weights,
        started_from=writer.started_from,
        manifest=manifest.hash,
        seed=seed,
        texts=[record["text"] for record in records],
        ids=[record["ids"] for record in records] if writer.ids_tokenizer else None,
        ids_tokenizer=writer.ids_tokenizer,
        seconds_per_sample=sum(seconds) / len(seconds) if writer.timed else None,
        unconditional=[record["text"] for record in passages],
    )


def generate_all(
    manifest: Manifest, entries: Sequence[SystemEntry], *, output: Path, seed: int, judge_dir: Path | None, device: str
) -> list[Generations]:
    """Every system's texts, and `output/generations.json`, by which the later stages find them."""
    found = [
        generate(manifest, entry, output=output, seed=seed, judge_dir=judge_dir, device=device) for entry in entries
    ]
    atomic_write(output / "generations.json", json.dumps([asdict(item) for item in found], ensure_ascii=False))
    return found


def load_generations(output: Path, manifest: Manifest) -> list[Generations]:
    """What `generate_all` left. Raises DataError if it belongs to another manifest."""
    path = output / "generations.json"
    if not path.exists():
        raise DataError(f"{path}: no such file; run `python -m evaluation generate --output {output}` first")
    found = [Generations(**{**item, "entry": SystemEntry(**item["entry"])}) for item in json.loads(path.read_text())]
    refuse_other_manifests(found, manifest, path)
    return found


def refuse_other_manifests(generations: Sequence[Generations], manifest: Manifest, where: Path | str) -> None:
    for item in generations:
        if item.manifest != manifest.hash:
            raise DataError(
                f"{where}: {item.entry.name} was generated from manifest {item.manifest[:12]}, not from this one "
                f"({manifest.hash[:12]}); texts of different manifests are never compared"
            )


def _written(
    writer: Writer,
    entry: SystemEntry,
    manifest: Manifest,
    requests: Sequence[Request],
    kind: str,
    output: Path,
    seed: int,
) -> list[dict[str, Any]]:
    from tqdm import tqdm

    # Unconditional passages depend on the manifest through their length alone, which is in `kind`.
    key = hash_of([writer.fingerprint, manifest.hash if kind == "continuation" else None, seed])
    path = output / "cache" / "generations" / f"{key[:24]}-{kind}.jsonl"
    records = {record["id"]: record for record in read_log(path) if "id" in record}
    # Longest first: what does not fit in memory fails at once, and rows of a batch are of like length.
    todo = sorted((r for r in requests if r.id not in records), key=lambda r: (-r.target_tokens, -len(r.prefix)))
    if todo and writer.timed:
        # A first short text, thrown away: loading and compilation are not time per sample.
        writer.write([Request(todo[0].id, todo[0].prefix, min(2, todo[0].target_tokens), todo[0].seed)])
    with tqdm(
        total=len(requests), initial=len(requests) - len(todo), desc=f"{entry.name} {kind}", disable=None
    ) as progress:
        for start in range(0, len(todo), entry.batch_size):
            batch = todo[start : start + entry.batch_size]
            began = time.perf_counter()
            texts = writer.write(batch)
            seconds = (time.perf_counter() - began) / len(batch)
            new = [
                {
                    "id": r.id,
                    "text": w.text,
                    "target_tokens": r.target_tokens,
                    "seconds": round(seconds, 6),
                    "ids": w.ids,
                }
                for r, w in zip(batch, texts, strict=True)
            ]
            append_jsonl(path, new)
            records.update({record["id"]: record for record in new})
            progress.update(len(batch))
    return [records[request.id] for request in requests]
