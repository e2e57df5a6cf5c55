"""Lengths drawn from those of training: the right distribution, given a prompt; kept with a model."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatext.config import ConfigError
from megatext.data.stream import DataConfig, TokenStream
from megatext.generation.lengths import draw_target_tokens, read_lengths, write_lengths


def test_draws_are_those_of_longer_texts() -> None:
    quantiles = [4, 6, 6, 10]
    found = Counter(draw_target_tokens(quantiles, 5, 100, seed) for seed in range(3000))
    assert set(found) == {1, 5} and found[1] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert {draw_target_tokens(quantiles, 5, 3, seed) for seed in range(50)} == {1, 3}
    assert draw_target_tokens(quantiles, 10, 7, 0) == 7
    assert draw_target_tokens(quantiles, 0, 100, 5) == draw_target_tokens(quantiles, 0, 100, 5)
    with pytest.raises(ConfigError, match="exported without the lengths"):
        draw_target_tokens([], 1, 5, 0)


def test_what_is_written_is_the_windows_distribution(shards: Path, tmp_path: Path) -> None:
    data = DataConfig(str(shards), row_tokens=32, max_tokens=32)
    write_lengths(data, tmp_path)
    stream = TokenStream(data, seed=5, rows_per_step=1)
    every = np.sort(stream.locate(0, stream.sources[0].windows).length)
    found = read_lengths(tmp_path)
    assert found[0] == every[0] and found[-1] == every[-1] and found[100] == pytest.approx(np.median(every), abs=1)
    assert found == sorted(found) and np.mean(found) == pytest.approx(every.mean(), rel=0.02)
    assert read_lengths(tmp_path / "nothing") == []


def test_without_shards_an_export_does_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lengths(DataConfig(str(tmp_path / "gone"), row_tokens=32, max_tokens=32), tmp_path)
    assert "warning: no lengths.json" in capsys.readouterr().out and read_lengths(tmp_path) == []
