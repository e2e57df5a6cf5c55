"""What every test shares: property tests that repeat exactly, and GPU tests that are skipped where there is none."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from megatext.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, ShardWriter, write_json

TEXT = ["The quick brown fox jumps over the lazy dog.", "Numbers such as 1, 2 and 3 are tokens too."] * 20

# No deadline: the first example pays for imports, and a shared machine is slow now and then.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts named by MEGATEXT_DATA; tests that ask for it are skipped without it."""
    folder = os.environ.get("MEGATEXT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEGATEXT_DATA does not name a folder with real texts")
    return Path(folder)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer of 300 pieces, trained on a few sentences."""
    from data_tools.train_tokenizer import main

    folder = tmp_path_factory.mktemp("tokenizer")
    words = "the a cat dog sat ran on under mat tree and then it was very big small red blue".split()
    lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + "." for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    main(["--input", str(folder / "text.txt"), "--vocab-size", "300", "--output", str(folder / "out")])
    return folder / "out"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of a few sentences, with their tokenizer."""
    from data_tools.train_tokenizer import train as train_tokenizer

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
