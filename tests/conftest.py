"""What every test shares: property tests that repeat exactly, and GPU tests that are skipped where there is none."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
