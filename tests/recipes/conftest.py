"""Shards of a few sentences with their tokenizer, for recipes."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.train_tokenizer import train as train_tokenizer
from megatext.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, ShardWriter, write_json

TEXT = ["The quick brown fox jumps over the lazy dog.", "Numbers such as 1, 2 and 3 are tokens too."] * 20


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.save(directory / TOKENIZER_FOLDER)
    splits = {}
    for split, count in (("train", 80), ("validation", 20)):
        writer = ShardWriter(directory / f"{split}-000000.tar")
        for number in range(count):
            ids = [*tokenizer.encode(TEXT[number % 2][: 8 + number % 30]), tokenizer.eos_id]
            writer.add(f"{split}-{number}", {"tokens": np.array(ids, np.uint16)}, {"n_tokens": len(ids)}, len(ids))
        entry = writer.close()
        splits[split] = {"documents": entry["samples"], "tokens": entry["tokens"], "shards": [entry]}
    identity = {
        "fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "tokenizer": identity, "splits": splits})
    return directory
