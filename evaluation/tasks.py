"""Tasks: which documents are continued, where they are cut, and how their texts are read."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from evaluation.files import hash_of_file, read_yaml
from evaluation.hub import offline_hint
from megatext.config import ConfigError, from_dict
from megatext.data import DataError
from megatext.data.shards import MANIFEST, TOKENIZER_FOLDER, read_manifest
from megatext.data.tar_index import TarIndex

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskConfig:
    """A continuation task. Documents are chosen by the rank of a hash, so a smaller n is a prefix of a larger one."""

    name: str
    """Enters the hashes that choose documents and cuts: another name draws other documents."""
    source: str
    """`hf:NAME[@REVISION][:CONFIG]:SPLIT`, `shards:DIR:SPLIT`, or a path: .jsonl[.gz|.zst], .parquet, text."""
    text_unit: Literal["separator", "blank_line", "line"] = "separator"
    """What ends a document in a text file: `<|endoftext|>` (without one the file is one document), a blank line, or
    the end of a line."""
    n: int = 1000
    """Number of samples; fewer eligible documents are an error."""
    seed: int = 0
    """Seed of the choice of documents and of the cuts."""
    min_tokens: int = 8
    """Documents with fewer reference tokens are passed over."""
    max_tokens: int = 1024
    """Documents are cut to this many reference tokens."""
    split_fraction: tuple[float, float] = (0.4, 0.6)
    """The prefix takes a share of the tokens drawn uniformly from this range."""
    reference_tokenizer: str | None = "Qwen/Qwen3-1.7B"
    """Decides cut and split, once for all systems: a directory or a name on the hub. null: the shards' own, or words
    between white space for plain text."""

    def __post_init__(self) -> None:
        low, high = self.split_fraction
        if not 0 < low <= high < 1:
            raise ConfigError(f"task {self.name}: split_fraction must satisfy 0 < low <= high < 1, got [{low}, {high}]")
        if self.n < 1 or not 2 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"task {self.name}: needs n >= 1 and 2 <= min_tokens <= max_tokens")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"task {self.name!r}: the name becomes a folder; write it with letters, digits, . - _")


def load_task(
    name_or_file: str, *, source: str | None = None, tokenizer: str | None = None, limit: int | None = None
) -> TaskConfig:
    """A task from a YAML file or from `evaluation/tasks/NAME.yaml`, with another source, reference tokenizer or smaller
    n if given."""
    shipped = sorted(path.stem for path in TASKS.glob("*.yaml"))
    path = TASKS / f"{name_or_file}.yaml" if name_or_file in shipped else Path(name_or_file)
    if not path.is_file():
        raise ConfigError(f"{name_or_file}: no such task file; shipped tasks: {', '.join(shipped)}")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a task is a mapping of keys to values")
    given = {"source": source, "reference_tokenizer": tokenizer}
    task = from_dict(TaskConfig, {**data, **{k: v for k, v in given.items() if v is not None}}, where=str(path))
    return task if limit is None else replace(task, n=min(task.n, limit))


@dataclass(frozen=True)
class Pool:
    """Documents a task may choose from. Their texts are read only when asked for: a pool may be larger than memory."""

    ids: list[str]
    """Stable names: a shard's keys, the `id` a data set gives, or the hash of a text."""
    read: Callable[[Sequence[int]], list[str]]
    """The texts of some documents, by their places in `ids`."""
    tokenizer: Path | None = None
    """The tokenizer the documents were stored with, if any."""


def open_pool(task: TaskConfig) -> Pool:
    """The documents of a task's source. Raises DataError for a missing, damaged or empty one."""
    kind, _, rest = task.source.partition(":")
    if kind == "shards":
        directory, _, split = rest.rpartition(":")
        pool = _shards(Path(directory or rest), split if directory else "test")
    elif kind == "hf":
        pool = _hugging_face(rest)
    else:
        pool = _files(Path(task.source), task.text_unit)
    if not pool.ids:
        raise DataError(f"{task.source}: holds no documents")
    return pool


def _files(path: Path, unit: str) -> Pool:
    """A file or a folder, read once for the ids and once more for each lot of texts."""
    places: dict[str, int] = {}
    texts: dict[str, str] = {}
    for place, (identity, text) in enumerate(tqdm(_documents(path, unit), desc="documents", unit="", disable=None)):
        if texts.setdefault(identity, own := _text_id(text)) != own:
            raise DataError(f"{path}: two documents have the id {identity}; a task needs ids that tell them apart")
        places.setdefault(identity, place)
    order = list(places.values())

    del texts

    def read(indices: Sequence[int]) -> list[str]:
        wanted = {order[index]: rank for rank, index in enumerate(indices)}
        found = [""] * len(indices)
        for place, (_, document) in enumerate(_documents(path, unit)):
            if place in wanted:
                found[wanted[place]] = document
        return found

    return Pool(list(places), read)


def _documents(path: Path, unit: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each document of a file or folder."""
    from data_tools import sources

    if not path.exists():
        raise DataError(f"{path}: no such file; a source is hf:NAME[:CONFIG]:SPLIT, shards:DIR:SPLIT, or a path")
    for name in _files_of(path, unit):
        if not name.endswith(sources.SUFFIXES) or name.endswith(".txt"):
            yield from ((_text_id(text), text) for text in _parts(Path(name), unit))
            continue
        for chunk in sources.read([name]):
            documents, problems = sources.decode(chunk)
            for problem in problems:
                if problem.cause != "empty":
                    raise DataError(f"{problem.message}; mend or remove it")
            for document in documents:
                given = document.meta.get("id", _id_of(chunk.items[int(document.key[-9:]) - chunk.first]))
                plain = isinstance(given, str | int) and not isinstance(given, bool)
                yield (str(given) if plain else _text_id(document.text)), document.text


def _files_of(path: Path, unit: str) -> list[str]:
    """What is read of a file or folder. One Billion Word's files have no ending, or one of their own."""
    from data_tools import sources

    if path.is_file():
        return [str(path)]
    files = sorted(str(f) for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    known = [name for name in files if name.endswith(sources.SUFFIXES)]
    if unit != "line":
        return sources.expand([str(path)])
    if known and len(known) < len(files):
        raise DataError(f"{path}: holds files of several kinds, {Path(files[0]).name} and others; give the one to read")
    return files


def _id_of(item: Any) -> Any:
    """The `id` of a line of JSON."""
    if not isinstance(item, bytes) or b'"id"' not in item:
        return None
    record = json.loads(item)
    return record.get("id") if isinstance(record, dict) else None


def _parts(path: Path, unit: str) -> Iterator[str]:
    from data_tools.sources import SEPARATOR

    ends = {"separator": SEPARATOR, "blank_line": "\n\n", "line": "\n"}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    yield from (part.strip() for part in text.split(ends[unit]) if part.strip())


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _shards(directory: Path, split: str) -> Pool:
    from megatext.tokenizer import load_tokenizer

    entry = read_manifest(directory)["splits"].get(split)
    if entry is None:
        raise DataError(f"{directory}: has no split {split}; write shards with `python -m data_tools.shard`")
    tokenizer = load_tokenizer(directory / TOKENIZER_FOLDER)
    shards = [TarIndex(directory / shard["file"]) for shard in entry["shards"]]
    places = [(shard, document) for shard in shards for document in range(len(shard))]

    def text(index: int) -> str:
        shard, document = places[index]
        return tokenizer.decode(shard.array(document, 0, int(shard.lengths[document])).tolist())

    ids = [shard.keys[document] for shard, document in places]
    return Pool(ids, lambda indices: [text(index) for index in indices], directory / TOKENIZER_FOLDER)


def _hugging_face(rest: str) -> Pool:
    import datasets

    parts = rest.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"hf:{rest}: write hf:NAME[@REVISION]:SPLIT or hf:NAME[@REVISION]:CONFIG:SPLIT")
    name, _, revision = parts[0].partition("@")
    try:
        if Path(name, "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(name)[parts[-1]]
        else:
            data = datasets.load_dataset(name, *parts[1:-1], split=parts[-1], revision=revision or None)
    except (ValueError, KeyError, OSError) as error:
        hint = offline_hint("--source PATH (a copy of the data set: a file, a folder, hf:FOLDER:SPLIT)")
        raise DataError(f"hf:{rest}: cannot be loaded ({' '.join(str(error).split())[:300]}){hint}") from error
    if "text" not in data.column_names:
        raise DataError(f"hf:{rest}: has no column `text`; its columns are {data.column_names}")
    given = "id" in data.column_names
    places: dict[str, int] = {}
    for place, value in enumerate(tqdm(data["id" if given else "text"], desc="documents", disable=None)):
        places.setdefault(str(value) if given else _text_id(value.strip()), place)
    order = list(places.values())
    return Pool(list(places), lambda indices: [data[order[index]]["text"].strip() for index in indices])


def stamp_of(task: TaskConfig) -> Any:
    """What a source looked like, without reading it: a manifest of an unchanged source is not made again."""
    kind, _, rest = task.source.partition(":")
    if kind == "hf" and not Path(rest.partition(":")[0]).is_dir():
        return task.source
    if kind == "shards":
        return hash_of_file(Path(rest.rpartition(":")[0] or rest) / MANIFEST)
    path = Path(rest.partition(":")[0] if kind == "hf" else task.source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
