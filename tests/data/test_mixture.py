"""Several sources: exact proportions, each source's own epochs, state still one integer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatext.config import ConfigError, from_dict, to_dict
from megatext.data import DataError
from megatext.data.mixture import Mixture, counts_of
from megatext.data.stream import DataConfig, SourceConfig, TokenStream
from tests.data.corpus import write_corpus


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(20_000, 50_000))
def test_counts_are_the_nearest_whole_numbers(shares: list[float], block: int) -> None:
    exact = np.array(shares) / sum(shares) * block
    if exact.min() < 1:
        return
    counts = counts_of(np.array(shares), block)
    assert sum(counts) == block
    assert np.abs(np.array(counts) - exact).max() < 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 5))
def test_every_position_of_every_source_comes_once_and_in_proportion(counts: list[int], seed: int, blocks: int) -> None:
    mixture, size = Mixture(counts, seed), sum(counts)
    source, position = mixture.locate(np.arange(blocks * size))
    for number, count in enumerate(counts):
        assert sorted(position[source == number]) == list(range(blocks * count))
    for block in range(blocks):
        assert np.bincount(source[block * size : (block + 1) * size], minlength=len(counts)).tolist() == counts
    again = mixture.locate(np.array([blocks * size - 1]))
    assert (again[0][0], again[1][0]) == (source[-1], position[-1])


def test_sources_take_turns_within_a_block() -> None:
    source, _ = Mixture([30, 70], 0).locate(np.arange(100))
    assert 5 < source[:50].tolist().count(0) < 25
    assert source.tolist() != Mixture([30, 70], 1).locate(np.arange(100))[0].tolist()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """400 short documents, and 30 long ones: three windows each."""
    directory = tmp_path_factory.mktemp("corpora")
    write_corpus(directory / "short", [12] * 400, per_shard=100)
    write_corpus(directory / "long", [72] * 30, per_shard=10)
    return str(directory / "short"), str(directory / "long")


def test_weights_are_shares_of_tokens_and_sources_have_their_own_epochs(corpora: tuple[str, str]) -> None:
    more = (SourceConfig(corpora[1], weight=3.0),)
    stream = TokenStream(DataConfig(corpora[0], 1.0, None, more, "train", 48, 24), seed=3, rows_per_step=8)
    read: dict[str, list[tuple[int, ...]]] = {"12": [], "24": []}
    sample, resumed_from = 0, 0
    while sample < 4096:
        plan = stream.plan(sample)
        batch = stream.batch(plan, slice(None))
        for r, keys in enumerate(batch.documents):
            for s in range(len(keys)):
                piece = batch.tokens[r][batch.segment[r] == s]
                read[str(len(piece))].append((int(keys[s].removeprefix("train-doc-")), int(piece[0])))
        resumed_from, sample = sample, plan.next_sample
    tokens = {length: int(length) * len(pieces) for length, pieces in read.items()}
    assert abs(tokens["24"] / sum(tokens.values()) - 0.75) < 0.005
    assert stream.epochs(sample) == pytest.approx([len(read["12"]) / 400, len(read["24"]) / 90], rel=0.02)
    times = [read["24"].count(piece) for piece in set(read["24"])]
    assert len(times) == 90, "every window of the smaller source"
    assert max(times) - min(times) <= 1, "is read equally often: epochs of its own"
    other = TokenStream(stream.config, seed=3, rows_per_step=8)
    assert [row.tolist() for row in other.plan(resumed_from).rows] == [
        row.tolist() for row in stream.plan(resumed_from).rows
    ]


def test_sources_that_do_not_go_together(corpora: tuple[str, str], tmp_path: Path) -> None:
    def stream(*more: SourceConfig, rows: int = 8) -> TokenStream:
        return TokenStream(
            DataConfig(corpora[0], more_sources=more, row_tokens=48, max_tokens=24), seed=0, rows_per_step=rows
        )

    write_corpus(tmp_path, [12] * 400)
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace('"test"', '"another"'))
    with pytest.raises(DataError, match="made with another tokenizer"):
        stream(SourceConfig(str(tmp_path)))
    with pytest.raises(DataError, match=r"long: split 'train' holds 90 windows.*fewer rows"):
        stream(SourceConfig(corpora[1], weight=100.0), rows=60)
    with pytest.raises(DataError, match=r"long: its weight makes it less than one sample in 4096"):
        stream(SourceConfig(corpora[1], weight=0.0001))
    with pytest.raises(ConfigError, match=r"weight of .* is 0.0"):
        stream(SourceConfig(corpora[1], weight=0.0))
    orders = [
        stream(*more).order_fingerprint for more in ((), (SourceConfig(corpora[1]),), (SourceConfig(corpora[1], 2.0),))
    ]
    assert len(set(orders)) == 3
    assert orders[0] == stream().order_fingerprint


def test_sources_come_from_yaml() -> None:
    written = {"shards": "a", "weight": 2, "more_sources": [{"shards": "b", "weight": 0.5}, {"shards": "c"}]}
    config = from_dict(DataConfig, written, "x.yaml")
    assert [(s.shards, s.weight) for s in config.sources] == [("a", 2.0), ("b", 0.5), ("c", 1.0)]
    assert from_dict(DataConfig, to_dict(config), "x.yaml") == config
    with pytest.raises(ConfigError, match="wieght"):
        from_dict(DataConfig, {"shards": "a", "more_sources": [{"shards": "b", "wieght": 0.5}]}, "x.yaml")
