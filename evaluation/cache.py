"""What costs time is kept as it is found: an append-only file a kind of result, read back by content."""

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.files import append_jsonl, hash_of, read_log


class Cache:
    """Values by key in one file. What a kill cuts short is the last line alone, and is computed again.

    `what` is all that a value depends on besides its key: the hash of weights, settings, code. It names the file.
    """

    def __init__(self, folder: Path, kind: str, what: Any) -> None:
        self._path = folder / kind / f"{hash_of(what)[:24]}.jsonl"
        self._values: dict[str, Any] | None = None

    def complete(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Sequence[Any]],
        *,
        lot: int,
        done: Callable[[int], object] = lambda number: None,
    ) -> list[Any]:
        """The value of each key. `compute(places)` is called for `lot` missing ones at a time, in the order given, each
        key once; what it returned is on disk before it is called again. `done` hears how many keys are there."""
        values = self._load()
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        todo = sorted(place for key, place in first.items() if key not in values)
        done(sum(key in values for key in keys))
        asked = Counter(keys)
        for start in range(0, len(todo), lot):
            places = todo[start : start + lot]
            found = compute(places)
            append_jsonl(self._path, [{"key": keys[p], "value": v} for p, v in zip(places, found, strict=True)])
            values.update({keys[p]: v for p, v in zip(places, found, strict=True)})
            done(sum(asked[keys[p]] for p in places))
        return [values[key] for key in keys]

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The different keys that have no value yet."""
        values = self._load()
        return [key for key in dict.fromkeys(keys) if key not in values]

    def values(self, keys: Sequence[str]) -> list[Any]:
        """The value of each key; all of them must be there."""
        values = self._load()
        return [values[key] for key in keys]

    def stacked(self, keys: Sequence[str]) -> np.ndarray:
        """The `packed` vectors under "feature" as float32 [len(keys), width]; all of them must be there."""
        return np.stack([np.frombuffer(base64.b64decode(v["feature"]), dtype="<f4") for v in self.values(keys)])

    def _load(self) -> dict[str, Any]:
        if self._values is None:
            self._values = {record["key"]: record["value"] for record in read_log(self._path) if "key" in record}
        return self._values


def key_of(*parts: str) -> str:
    """A short name of some texts by their content."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def packed(vector: np.ndarray) -> str:
    """A float32 vector as text, exact."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
