"""A small shard directory for tests: documents whose tokens name their document and place."""

from pathlib import Path
from typing import Any

import numpy as np

from megatext.data.shards import FORMAT_VERSION, MANIFEST, ShardWriter, write_json

EOS = 2


def write_corpus(directory: Path, lengths: list[int], *, split: str = "train", per_shard: int = 7) -> list[np.ndarray]:
    """Shards of documents of the given lengths (eos counted); returns their tokens. Document d is d0, d1, ... eos."""
    directory.mkdir(parents=True, exist_ok=True)
    documents: list[np.ndarray] = []
    entries: list[dict[str, Any]] = []
    for first in range(0, len(lengths), per_shard):
        writer = ShardWriter(directory / f"{split}-{len(entries):06d}.tar")
        for d, length in enumerate(lengths[first : first + per_shard], first):
            tokens = ((100 * d + np.arange(length)) % 4093 + 3).astype(np.uint16)
            tokens[-1] = EOS
            writer.add(f"{split}-doc-{d}", {"tokens": tokens}, {"n_tokens": length}, length)
            documents.append(tokens)
        entries.append(writer.close())
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"fingerprint": "test", "vocab_size": 4096, "eos_id": EOS},
        "splits": {split: {"documents": len(lengths), "tokens": sum(lengths), "shards": entries}},
        "sources": [],
        "filters": {},
        "dropped": {},
    }
    write_json(directory / MANIFEST, manifest)
    return documents
