"""Rows that need no model, and texts that were written elsewhere."""

import random
from collections.abc import Sequence
from pathlib import Path

from evaluation.files import hash_of, hash_of_file, read_jsonl
from evaluation.manifest import Manifest
from evaluation.systems.base import Item, System, Written, item_seed, writing_code
from megatext.config import ConfigError
from megatext.data import DataError

SANITY = ("human", "other", "shuffled", "repeat", "empty")
"""What a number means is seen beside: the human target, another document's, its own tokens in random order, the prefix
over and over, nothing."""


class SanityRow(System):
    """One of SANITY."""

    timed = False

    def __init__(self, kind: str, manifest: Manifest, judge: Path | None) -> None:
        self.kind = kind
        samples = manifest.samples
        # Documents that are no samples, so that MAUVE of this row is what human text gets; the next sample's target
        # where the source had too few.
        others = manifest.others or (*samples[1:], *samples[:1])
        self._others = {sample.id: other.target for sample, other in zip(samples, others, strict=True)}
        if kind == "shuffled":
            if judge is None:
                raise ConfigError("the row `shuffled` shuffles the judge's tokens: give --judge DIR")
            from megatext.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(judge)
            self.ids_tokenizer = self._tokenizer.fingerprint()
        others_hash = hash_of(self._others) if kind == "other" else None
        self._fingerprint = hash_of(["sanity", kind, self.ids_tokenizer, others_hash, writing_code(Path(__file__))])

    def fingerprint(self) -> str:
        return self._fingerprint

    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        return [self._write(item, seed) for item in items]

    def _write(self, item: Item, seed: int) -> Written:
        if self.kind == "human":
            return Written(item.target)
        if self.kind == "other":
            return Written(self._others[item.id])
        if self.kind == "shuffled":
            ids = self._tokenizer.encode(item.target)
            random.Random(item_seed(seed, item)).shuffle(ids)
            return Written(self._tokenizer.decode(ids), ids)
        if self.kind == "repeat":
            again = " " + item.prefix.strip()
            return Written((again * (len(item.target) // len(again) + 1))[: len(item.target)])
        return Written("")


class Generations(System):
    """Texts that were written elsewhere: JSONL with `id` and `text`, and `manifest` (a hash) if its maker gave one."""

    timed = False

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._texts: dict[str, str] = {}
        for record in read_jsonl(path):
            if record.get("manifest", manifest.hash) != manifest.hash:
                raise DataError(
                    f"{path}: written for manifest {str(record['manifest'])[:12]}, not for {manifest.hash[:12]}; "
                    "generate again from this manifest"
                )
            if "id" not in record or not isinstance(record.get("text"), str):
                raise DataError(f"{path}: every line needs `id` and `text`; found the keys {sorted(record)}")
            if str(record["id"]) in self._texts:
                raise DataError(f"{path}: {record['id']} stands there twice; which text is meant?")
            # JSON may hold half a surrogate pair, which no file and no tokenizer takes.
            whole = record["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self._texts[str(record["id"])] = whole
        missing = [sample.id for sample in manifest.samples if sample.id not in self._texts]
        if missing:
            raise DataError(
                f"{path}: lacks {len(missing)} of {len(manifest.samples)} samples, the first is {missing[0]}"
            )
        self._fingerprint = hash_of(["jsonl", hash_of_file(path)])

    def fingerprint(self) -> str:
        return self._fingerprint

    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        return [Written(self._texts[item.id]) for item in items]
