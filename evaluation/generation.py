"""The generate stage: texts of every system, cached by content and written so that a kill loses at most a batch."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.cache import Cache, key_of
from evaluation.files import atomic_write, hash_of
from evaluation.manifest import Manifest
from evaluation.systems import SystemEntry, open_system
from evaluation.systems.base import Item, Length, Nats, System
from megatext.data import DataError

_LOT = 16
"""Texts whose likelihood is estimated at once: logits of all their tokens are in memory."""


@dataclass(frozen=True)
class Generated:
    """One system's texts in the manifest's order, and what is recorded of how they came about."""

    entry: SystemEntry
    """The row of the systems file."""
    fingerprint: str
    """What wrote, by content: weights, tokenizer, sampling, code."""
    weights: str | None
    """Hash of the model directory; None for rows without one."""
    started_from: str | None
    """Hash of the model its training started from; None where it started from random weights."""
    sampled_by: dict[str, Any] | None
    """All that it sampled by, where `entry.sampling` has what its row says; None where nothing tells."""
    training_flops: float | None
    """Of its training and of all that it stands on."""
    manifest: str
    """Hash of the manifest the texts belong to."""
    seed: int
    """Seed of the run."""
    length: Length
    """The rule of how long texts are."""
    texts: list[str]
    """A continuation for each sample."""
    ids: list[list[int]] | None
    """Token ids to score instead of the encoded texts (shuffled tokens)."""
    ids_tokenizer: str | None
    """Fingerprint of the tokenizer of `ids`."""
    prefixes_cut: int
    """Prefixes that were cut at their start because the system does not read more."""
    seconds_per_sample: float | None
    """Mean wall time of a text within its batch; None where it means nothing, or batches were of several sizes."""
    unconditional: list[str]
    """Passages written without a prefix."""
    traces: list[list[str]]
    """Of the first samples: what was to be read after every step."""
    likelihoods: list[Nats]
    """Of the first samples' targets."""


@dataclass(frozen=True)
class Settings:
    """What every system of a table is run with."""

    seed: int = 0
    """Of all sampling."""
    length: Length = Length()
    """How long texts are."""
    judge: Path | None = None
    """The model whose tokens the row `shuffled` shuffles."""
    device: str = "cpu"
    """cpu or cuda."""
    cache: Path = Path("cache")
    """Folder of what was written before."""


def items_of(manifest: Manifest, entry: SystemEntry, length: Length) -> tuple[list[Item], list[Item]]:
    """The continuations of a manifest, and an entry's passages without a prefix."""
    items = [Item(sample.id, sample.prefix, sample.target, length) for sample in manifest.samples]
    tokens = Length("fixed", entry.unconditional_tokens or int(manifest.task["max_tokens"]))
    model = entry.system.partition(":")[0] in ("hf", "model", "python")
    return items, [Item(str(i), "", "", tokens) for i in range(entry.unconditional if model else 0)]


def generate(manifest: Manifest, entry: SystemEntry, settings: Settings) -> Generated:
    """Write what is missing of a system's texts and return all of them."""
    system = open_system(entry, manifest, judge=settings.judge, device=settings.device)
    items, free = items_of(manifest, entry, settings.length)
    records = _written(system, entry, items, settings, "continuations")
    passages = _written(system, entry, free, settings, "unconditional") if free else []
    traces = _found(
        system,
        items[: entry.trace],
        settings,
        "traces",
        lambda some: [system.trace(item, settings.seed) for item in some],
    )
    likelihoods = _found(
        system,
        items[: entry.likelihood],
        settings,
        likelihoods_of(entry),
        lambda some: [asdict(nats) for nats in system.log_likelihood(some, settings.seed, **entry.likelihood_by)],
    )
    seconds = [record["seconds"] for record in records]
    alike = system.timed and len({record["batch_size"] for record in records}) == 1
    return Generated(
        entry=entry,
        fingerprint=system.fingerprint(),
        weights=system.weights,
        started_from=system.started_from,
        sampled_by=system.sampled_by,
        training_flops=system.training_flops,
        manifest=manifest.hash,
        seed=settings.seed,
        length=settings.length,
        texts=[record["text"] for record in records],
        ids=[record["ids"] for record in records] if system.ids_tokenizer else None,
        ids_tokenizer=system.ids_tokenizer,
        prefixes_cut=sum(record["prefix_cut"] > 0 for record in records),
        seconds_per_sample=sum(seconds) / len(seconds) if alike else None,
        unconditional=[record["text"] for record in passages],
        traces=traces,
        likelihoods=[Nats(**nats) for nats in likelihoods],
    )


def generate_all(
    manifest: Manifest, entries: Sequence[SystemEntry], settings: Settings, output: Path
) -> list[Generated]:
    """Every system's texts, and `output/generations.json`, by which the later stages find them."""
    for entry in entries:  # what is wrong with the last row is said before the first one writes
        open_system(entry, manifest, judge=settings.judge, device=settings.device)
    found = [generate(manifest, entry, settings) for entry in entries]  # one model in memory at a time
    atomic_write(output / "generations.json", json.dumps([asdict(item) for item in found], ensure_ascii=False))
    return found


def load_generations(output: Path, manifest: Manifest) -> list[Generated]:
    """What `generate_all` left. Raises DataError if it belongs to another manifest or version."""
    path = output / "generations.json"
    if not path.exists():
        raise DataError(f"{path}: no such file; run `python -m evaluation generate --output {output}` first")
    try:
        found = [
            Generated(
                **{
                    **item,
                    "entry": SystemEntry(**item["entry"]),
                    "length": Length(**item["length"]),
                    "likelihoods": [Nats(**nats) for nats in item["likelihoods"]],
                }
            )
            for item in json.loads(path.read_text())
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not of this version ({error}); generate again") from None
    refuse_other_manifests(found, manifest, path)
    return found


def refuse_other_manifests(generations: Sequence[Generated], manifest: Manifest, where: Path | str) -> None:
    for item in generations:
        if item.manifest != manifest.hash:
            raise DataError(
                f"{where}: {item.entry.name} was generated from manifest {item.manifest[:12]}, not from this one "
                f"({manifest.hash[:12]}); texts of different manifests are never compared"
            )


def cache_of(system: System, settings: Settings, kind: str) -> Cache:
    """The file of a system's texts. An item's key holds all of the manifest that its text depends on, so that more
    samples of the same task do not cost the first ones again. Kinds of devices draw other random numbers."""
    device = settings.device.partition(":")[0] if system.timed else ""
    return Cache(settings.cache / "generations", kind, [system.fingerprint(), settings.seed, device])


def likelihoods_of(entry: SystemEntry) -> str:
    """The kind of an entry's likelihoods: those that are estimated in another way are others."""
    return f"likelihoods-{hash_of(entry.likelihood_by)[:12]}" if entry.likelihood_by else "likelihoods"


def item_key(item: Item) -> str:
    return key_of(item.id, item.prefix, item.target, item.length.policy, str(item.length.tokens))


def _found(
    system: System, items: Sequence[Item], settings: Settings, kind: str, find: Callable[[list[Item]], list[Any]]
) -> list[Any]:
    """What `find` tells of each item, from the cache where it is there."""
    if not items:
        return []
    cache = cache_of(system, settings, kind)
    return cache.complete([item_key(item) for item in items], lambda at: find([items[i] for i in at]), lot=_LOT)


def _written(
    system: System, entry: SystemEntry, items: Sequence[Item], settings: Settings, kind: str
) -> list[dict[str, Any]]:
    from tqdm import tqdm

    # Longest first: what does not fit in memory fails at once, and rows of a batch are of like length.
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].target), -len(items[i].prefix)))
    warm = not system.timed

    def write(places: list[int]) -> list[dict[str, Any]]:
        nonlocal warm
        batch = [items[order[place]] for place in places]
        if not warm:
            # A first short text, thrown away: loading and compilation are not time per sample.
            length = Length("free", 2) if batch[0].length.policy == "free" else Length("fixed", 2)
            system.generate([Item(batch[0].id, batch[0].prefix, batch[0].target, length)], settings.seed)
            warm = True
        began = time.perf_counter()
        texts = system.generate(batch, settings.seed)
        seconds = round((time.perf_counter() - began) / len(batch), 6)
        return [
            {
                "id": item.id,
                "text": w.text,
                "ids": w.ids,
                "prefix_cut": w.prefix_cut,
                "seconds": seconds,
                "batch_size": entry.batch_size,
            }
            for item, w in zip(batch, texts, strict=True)
        ]

    keys = [item_key(items[place]) for place in order]
    with tqdm(total=len(items), desc=f"{entry.name}, {kind}", unit="text", disable=None) as progress:
        records = cache_of(system, settings, kind).complete(keys, write, lot=entry.batch_size, done=progress.update)
    by_place = dict(zip(order, records, strict=True))
    return [by_place[place] for place in range(len(items))]
