"""What is told of a shard directory, against figures of its own making."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_tools import inspect_shards
from data_tools.shard import shard
from data_tools.train_tokenizer import train
from megatext.data.tar_index import TarIndex
from tests.data_tools.test_shard import TEXTS, json_lines


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspected")
    train(TEXTS, 305).save(directory / "tokenizer")
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS))
    shard([str(directory / "a.jsonl")], str(directory / "tokenizer"), directory / "shards", validation_fraction=0.2)
    return directory / "shards"


def test_statistics_and_documents(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_shards.main([str(shards), "--show", "2"])
    out = capsys.readouterr().out
    lengths = TarIndex(shards / "train-000000.tar").lengths
    row = next(line for line in out.splitlines() if line.startswith("train ")).split()
    assert [int(row[i].replace(",", "")) for i in (1, 2, 4)] == [len(lengths), lengths.sum(), 1]
    expected = [lengths.min(), np.percentile(lengths, 10), np.median(lengths), np.percentile(lengths, 90)]
    assert [float(value) for value in row[5:]] == pytest.approx([*expected, lengths.max(), lengths.mean()], abs=0.51)
    shown = re.findall(r"--- (\w+): (\S+), (\d+) tokens", out)
    assert [split for split, _, _ in shown] == ["train"] * 2 + ["validation"] * 2 + ["test"] * len(shown[4:])
    index = TarIndex(shards / "train-000000.tar")
    assert [key for _, key, _ in shown[:2]] == [index.key(0), index.key(len(index) - 1)]
    texts = {f"a-{i:09d}": text for i, text in enumerate(TEXTS)}
    assert all(texts[key] in out for _, key, _ in shown)


def test_histogram(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    inspect_shards.main([str(shards), "--histogram", str(tmp_path / "lengths.png")])
    assert f"histogram: {tmp_path / 'lengths.png'}" in capsys.readouterr().out
    image = imread(tmp_path / "lengths.png")
    blue = (np.abs(image[..., :3] - np.array([0x48, 0x78, 0xA8]) / 255) < 0.02).all(-1)
    left, right = blue[:, : blue.shape[1] // 2].sum(), blue[:, blue.shape[1] // 2 :].sum()
    assert left > 2000 and right > 2000, "bars in both panels"
    with pytest.raises(SystemExit):
        inspect_shards.main([str(shards), "--histogram", str(tmp_path / "missing" / "lengths.png")])
    assert "missing" in capsys.readouterr().err


def test_a_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect_shards.main([str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(SystemExit):
        inspect_shards.main([str(tmp_path)])
    assert "format 99" in capsys.readouterr().err
