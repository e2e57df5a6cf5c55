"""A small tokenizer for recipes and generators."""

from pathlib import Path

import pytest


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
