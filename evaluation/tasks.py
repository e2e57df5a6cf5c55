"""Tasks: which documents are continued, where they are cut, and how their texts are read."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.files import read_jsonl
from megatext.config import ConfigError, from_dict
from megatext.data import DataError
from megatext.data.shards import TOKENIZER_FOLDER, read_manifest
from megatext.data.tar_index import TarIndex

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskConfig:
    """A continuation task. Documents are chosen by the rank of a hash, so a smaller n is a prefix of a larger one."""

    name: str
    """Enters the hashes that choose documents and cuts: another name draws other documents."""
    source: str
    """`shards:DIR:SPLIT`, a path to .jsonl, .jsonl.gz or .txt, or `hf:NAME[:CONFIG]:SPLIT`."""
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
    reference_tokenizer: str | None = None
    """Decides cut and split, once for all systems. None: the shards' own, or whitespace words for plain text."""

    def __post_init__(self) -> None:
        low, high = self.split_fraction
        if not 0 < low <= high < 1:
            raise ConfigError(f"task {self.name}: split_fraction must satisfy 0 < low <= high < 1, got [{low}, {high}]")
        if self.n < 1 or not 2 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"task {self.name}: needs n >= 1 and 2 <= min_tokens <= max_tokens")


def load_task(name_or_file: str, *, source: str | None = None, limit: int | None = None) -> TaskConfig:
    """A task from a YAML file or from `evaluation/tasks/NAME.yaml`, with another source or a smaller n if given."""
    import yaml

    shipped = sorted(path.stem for path in TASKS.glob("*.yaml"))
    path = TASKS / f"{name_or_file}.yaml" if name_or_file in shipped else Path(name_or_file)
    if not path.is_file():
        raise ConfigError(f"{name_or_file}: no such task file; shipped tasks: {', '.join(shipped)}")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a task is a mapping of keys to values")
    task = from_dict(TaskConfig, data if source is None else {**data, "source": source}, where=str(path))
    return task if limit is None else replace(task, n=min(task.n, limit))


@dataclass(frozen=True)
class Pool:
    """Documents a task may choose from, read one at a time."""

    ids: list[str]
    """Stable names: a shard's keys, the hash of a text, or the id a data set gives."""
    read: Callable[[int], str | list[int]]
    """Document i as text, or as token ids of `tokenizer` without end of document."""
    tokenizer: Any = None
    """Tokenizer of the ids `read` gives (megatext.tokenizer.Tokenizer), None where it gives text."""
    lengths: list[int] | None = None
    """Upper bounds of the token counts where they are known without reading; spares reading short documents."""


def open_pool(source: str) -> Pool:
    """The documents of a source. Raises DataError for a missing or empty one."""
    kind, _, rest = source.partition(":")
    if kind == "shards":
        directory, _, split = rest.rpartition(":")
        pool = _shards(Path(directory or rest), split if directory else "test")
    elif kind == "hf":
        pool = _hugging_face(rest)
    else:
        texts = {hashlib.sha256(text.encode()).hexdigest()[:20]: text for text in _texts(Path(source))}
        values = list(texts.values())
        pool = Pool(list(texts), values.__getitem__)
    if not pool.ids:
        raise DataError(f"{source}: holds no documents")
    return pool


def _texts(path: Path) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for record in read_jsonl(path):
            if not isinstance(record.get("text"), str):
                raise DataError(f"{path}: a line has no `text`; its keys are {sorted(record)}")
            yield record["text"]
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
        # A file without blank lines holds a document a line (One Billion Word); else blank lines part documents.
        yield from (part for part in text.split("\n\n" if "\n\n" in text.strip() else "\n") if part.strip())
    else:
        raise DataError(f"{path}: no such file; a source is shards:DIR:SPLIT, hf:NAME[:CONFIG]:SPLIT, or a path")


def _shards(directory: Path, split: str) -> Pool:
    from megatext.tokenizer import load_tokenizer

    entry = read_manifest(directory)["splits"].get(split)
    if entry is None:
        raise DataError(f"{directory}: has no split {split}; write shards with `python -m data_tools.shard`")
    tokenizer = load_tokenizer(directory / TOKENIZER_FOLDER)
    shards = [TarIndex(directory / shard["file"]) for shard in entry["shards"]]
    places = [(shard, document) for shard in shards for document in range(len(shard))]
    lengths = [int(shard.lengths[document]) for shard, document in places]

    def read(index: int) -> list[int]:
        shard, document = places[index]
        tokens: list[int] = shard.array(document, 0, lengths[index]).tolist()
        return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_id else tokens

    return Pool([shard.keys[document] for shard, document in places], read, tokenizer, lengths)


def _hugging_face(rest: str) -> Pool:
    import datasets

    parts = rest.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"hf:{rest}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    data = datasets.load_dataset(*parts[:-1], split=parts[-1])
    if "text" not in data.column_names:
        raise DataError(f"hf:{rest}: has no column `text`; its columns are {data.column_names}")
    ids = [str(value) for value in data["id"]] if "id" in data.column_names else [str(i) for i in range(len(data))]
    return Pool(ids, lambda index: data[index]["text"])
