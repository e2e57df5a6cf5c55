"""The stream: what a step holds is a function of (seed, sample) alone, and every window comes once an epoch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.data.packing import TokenBatch
from megatext.data.stream import DataConfig, TokenStream
from tests.data.corpus import EOS, write_corpus

LENGTHS = [int(n) for n in np.clip(np.random.default_rng(0).lognormal(3, 0.8, 90), 2, 150)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    directory = tmp_path_factory.mktemp("shards")
    return directory, write_corpus(directory, LENGTHS)


def make(directory: Path, *, rows: int = 4, seed: int = 0, **options: object) -> TokenStream:
    config = DataConfig(str(directory), **{"row_tokens": 64, "max_tokens": 48, **options})  # type: ignore[arg-type]
    return TokenStream(config, seed=seed, rows_per_step=rows)


def segments(batch: TokenBatch) -> list[tuple[str, tuple[int, ...]]]:
    """(document key, tokens) of every segment in the batch."""
    found = []
    for r, keys in enumerate(batch.documents):
        for s, key in enumerate(keys):
            found.append((key, tuple(batch.tokens[r][batch.segment[r] == s].tolist())))
    return found


def test_every_window_once_an_epoch(corpus: tuple[Path, list[np.ndarray]]) -> None:
    directory, documents = corpus
    stream = make(directory)
    expected = sorted(
        (f"train-doc-{d}", tuple(tokens[a : a + 48].tolist()))
        for d, tokens in enumerate(documents)
        for a in range(0, len(tokens), 48)
    )
    assert stream.sources[0].windows == len(expected)
    assert stream.tokens_per_epoch == sum(LENGTHS)
    found, sample = [], 0
    while sample < stream.sources[0].windows:
        plan = stream.plan(sample)
        assert plan.first_sample == sample < plan.next_sample
        assert sorted(np.concatenate(plan.rows)) == list(range(sample, plan.next_sample))
        pairs = zip(np.concatenate(plan.rows), segments(stream.batch(plan, slice(None))), strict=True)
        found += [segment for index, segment in pairs if index < stream.sources[0].windows]
        sample = plan.next_sample
    assert sorted(found) == expected


def test_batches_are_laid_out_as_documented(corpus: tuple[Path, list[np.ndarray]]) -> None:
    stream = make(corpus[0])
    plan = stream.plan(37)
    batch = stream.batch(plan, slice(0, 4))
    assert all(t.shape == (4, 64) and t.dtype == torch.int64 for t in (batch.tokens, batch.segment, batch.position))
    assert batch.row_index.tolist() == [int(row[0]) for row in plan.rows]
    assert int((batch.segment >= 0).sum()) == plan.tokens
    padding = batch.segment == -1
    assert not batch.tokens[padding].any()
    assert not batch.position[padding].any()
    for r in range(4):
        for s in range(len(batch.documents[r])):
            where = (batch.segment[r] == s).nonzero().flatten()
            assert torch.equal(where, torch.arange(len(where)) + where[0]), "a segment is contiguous"
            assert torch.equal(batch.position[r][where], torch.arange(len(where)))
    assert batch.hidden is None
    assert batch.to("cpu").documents == batch.documents


@given(sample=st.integers(0, 10_000), rows=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_rows_do_not_depend_on_who_reads_them(
    corpus: tuple[Path, list[np.ndarray]], sample: int, rows: list[int]
) -> None:
    stream, other = make(corpus[0]), make(corpus[0])
    plan = stream.plan(sample)
    whole, part = stream.batch(plan, slice(None)), other.batch(other.plan(sample), rows)
    for name in ("tokens", "segment", "position", "row_index"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name))


@given(data=st.data())
def test_ranks_together_read_the_order_each_sample_once_however_often_they_change(
    corpus: tuple[Path, list[np.ndarray]], data: st.DataObject
) -> None:
    """Steps in phases of other worlds and micro-batches; before each, the run is resumed from one integer."""
    packed, rows = data.draw(st.booleans()), 12
    sample, read = 0, list[tuple[str, tuple[int, ...]]]()
    for _ in range(data.draw(st.integers(1, 4))):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
        micro = data.draw(st.sampled_from([m for m in (1, 2, 3, 4, 6, 12) if rows // world % m == 0]))
        ranks = [make(corpus[0], rows=rows, packed=packed) for _ in range(world)]
        for _ in range(data.draw(st.integers(1, 3))):
            plans = [stream.plan(sample) for stream in ranks]
            assert len({plan.next_sample for plan in plans}) == 1
            count = rows // world // micro
            parts = [s.micro_batches(plans[rank], rank, count, micro) for rank, s in enumerate(ranks)]
            assert all([len(batch.tokens) for batch in part] == [micro] * count for part in parts), "equal steps"
            read += [segment for part in parts for batch in part for segment in segments(batch)]
            sample = plans[0].next_sample
    one = make(corpus[0], rows=rows, packed=packed)
    windows = one.locate(0, sample)
    places = zip(windows.document.tolist(), windows.start.tolist(), windows.length.tolist(), strict=True)
    prefix = [(f"train-doc-{d}", tuple(corpus[1][d][a : a + n].tolist())) for d, a, n in places]
    assert sorted(read) == sorted(prefix)


def test_seeds_and_epochs_differ(corpus: tuple[Path, list[np.ndarray]]) -> None:
    stream = make(corpus[0])
    here = segments(stream.batch(stream.plan(0), slice(None)))
    assert here == segments(make(corpus[0]).batch(stream.plan(0), slice(None)))
    for other, sample in ((make(corpus[0], seed=1), 0), (stream, stream.sources[0].windows)):
        assert here != segments(other.batch(other.plan(sample), slice(None)))


def test_one_window_a_row(corpus: tuple[Path, list[np.ndarray]]) -> None:
    stream = make(corpus[0], packed=False)
    plan = stream.plan(stream.sources[0].windows - 2)  # reaches into the next epoch
    assert plan.next_sample - plan.first_sample == 4
    batch = stream.batch(plan, [0, 1, 2, 3])
    assert batch.segment.max() == 0
    assert all(len(keys) == 1 for keys in batch.documents)
    assert batch.row_index.tolist() == list(range(plan.first_sample, plan.next_sample))


def test_documents_end_with_eos(corpus: tuple[Path, list[np.ndarray]]) -> None:
    stream = make(corpus[0], max_tokens=64)
    for key, tokens in segments(stream.batch(stream.plan(0), slice(None))):
        assert len(tokens) == 64 or tokens[-1] == EOS, key


def test_too_small_a_corpus_says_what_to_do(corpus: tuple[Path, list[np.ndarray]]) -> None:
    windows = make(corpus[0]).sources[0].windows
    with pytest.raises(DataError, match=rf"holds {windows} windows.*1000 rows of 64 tokens.*fewer rows per step"):
        make(corpus[0], rows=1000)
    with pytest.raises(DataError, match=rf"holds {windows} windows.*500 rows with a window each"):
        make(corpus[0], rows=500, packed=False)
    with pytest.raises(DataError, match="no split 'dev', only train"):
        make(corpus[0], split="dev")


def test_bad_sizes_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match=r"data.max_tokens \(65\)"):
        DataConfig("x", row_tokens=64, max_tokens=65)
    with pytest.raises(ConfigError, match="positive"):
        DataConfig("x", row_tokens=0, max_tokens=0)


def test_missing_and_foreign_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json.*data_tools.shard"):
        make(tmp_path)
    write_corpus(tmp_path, LENGTHS)
    (tmp_path / "train-000001.tar").write_bytes((tmp_path / "train-000002.tar").read_bytes())
    with pytest.raises(DataError, match=r"train-000001.tar: its sha256 is .* the manifest says"):
        make(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match="train-000001.tar: no such shard"):
        make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(DataError, match="format 99"):
        make(tmp_path)
