"""Teacher states: storage, alignment with packed windows, partial coverage, refusal of others' states."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatext.data import DataError
from megatext.data.hidden_states import FORMAT_VERSION, Storage, add_document, from_stored, piece_name, to_stored
from megatext.data.shards import ShardWriter, read_manifest, split_fingerprint, write_json
from megatext.data.stream import DataConfig, SourceConfig, TokenStream
from megatext.data.tar_index import TarIndex
from tests.data.corpus import write_corpus

LENGTHS = [5, 70, 33, 12, 48, 100, 9, 27, 61, 30]
WIDTH = 8


def states_of(tokens: Any) -> torch.Tensor:
    """A state that tells its token: `[tokens, 8]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4096, WIDTH, generator=generator)[torch.as_tensor(tokens, dtype=torch.int64)]


def write_states(
    shards: Path, output: Path, storage: Storage, pieces: Sequence[tuple[str, int, int]], max_tokens: int = 32
) -> None:
    """States of the documents [first, stop) of token shards."""
    output.mkdir()
    entries = []
    for shard, first, stop in pieces:
        tokens = TarIndex(shards / shard)
        writer = ShardWriter(output / piece_name(shard, first))
        for document in range(first, stop):
            ids = tokens.array(document)
            windows = (ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens))
            parts = (to_stored(states_of(window.astype(np.int64)), storage) for window in windows)
            add_document(writer, tokens.key(document), len(ids), WIDTH, parts, storage)
        entries.append(writer.close() | {"token_shard": shard, "first_document": first})
    manifest = {
        "format_version": FORMAT_VERSION,
        "width": WIDTH,
        "max_tokens": max_tokens,
        "storage": storage,
        "tokenizer_fingerprint": "test",
        "splits": {"train": {"of": split_fingerprint(read_manifest(shards), "train"), "shards": entries}},
    }
    write_json(output / "manifest.json", manifest)


def stream(tmp_path: Path, **options: Any) -> TokenStream:
    config = {"row_tokens": 64, "max_tokens": 32, "hidden_states": str(tmp_path / "states"), **options}
    return TokenStream(DataConfig(str(tmp_path / "shards"), **config), seed=0, rows_per_step=2)


def read_all(reader: TokenStream) -> None:
    sample = 0
    while sample < reader.sources[0].windows:
        plan = reader.plan(sample)
        reader.batch(plan, slice(None))
        sample = plan.next_sample


@pytest.mark.parametrize(("storage", "error"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_storage_keeps_states(storage: Storage, error: float) -> None:
    states = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    states[7] = 0
    stored = to_stored(states, storage)
    again = from_stored(stored["hidden"], stored.get("scale")).float()
    assert (again - states).abs().amax(1).le(states.abs().amax(1) * error + 1e-12).all()


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_stream_aligns_states_with_tokens(storage: Storage, tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "shards", LENGTHS, per_shard=4)
    first, second, third = (f"train-{n:06d}.tar" for n in range(3))
    pieces = [(first, 0, 2), (first, 2, 4), (second, 1, 3), (third, 0, 1)]
    write_states(tmp_path / "shards", tmp_path / "states", storage, pieces)
    without = {"train-doc-4", "train-doc-7", "train-doc-9"}  # before, between and after the pieces
    reader = stream(tmp_path)
    sample, covered = 0, 0
    while sample < reader.sources[0].windows:
        plan = reader.plan(sample)
        batch = reader.batch(plan, slice(None))
        assert batch.hidden is not None
        assert batch.hidden_valid is not None
        expected = states_of(batch.tokens)
        tolerance = 0.01 if storage == "bf16" else 0.04
        valid = batch.hidden_valid
        assert torch.allclose(batch.hidden.float()[valid], expected[valid], atol=tolerance, rtol=tolerance)
        assert not batch.hidden[~valid].any()
        for r, keys in enumerate(batch.documents):
            for s, key in enumerate(keys):
                here = valid[r][batch.segment[r] == s]
                assert not here.any() if key in without else here.all()
        assert not valid[batch.segment == -1].any()
        covered += int(valid.sum())
        sample = plan.next_sample
    assert covered >= sum(len(tokens) for d, tokens in enumerate(documents) if f"train-doc-{d}" not in without)


def test_a_source_may_have_no_states(tmp_path: Path) -> None:
    write_corpus(tmp_path / "shards", LENGTHS)
    write_corpus(tmp_path / "more", [7] * 20)
    write_states(
        tmp_path / "shards", tmp_path / "states", "bf16", [("train-000000.tar", 0, 7), ("train-000001.tar", 0, 3)]
    )
    batch = (both := stream(tmp_path, more_sources=(SourceConfig(str(tmp_path / "more")),))).batch(
        both.plan(0), slice(None)
    )
    assert batch.hidden_valid is not None
    lengths = torch.stack([(batch.segment == s).sum(1) for s in range(9)])
    assert (lengths == 7).any(), "some documents of the second source are there"
    for r, keys in enumerate(batch.documents):
        for s in range(len(keys)):
            here = batch.segment[r] == s
            assert batch.hidden_valid[r][here].all() == (int(here.sum()) != 7)


def test_states_of_two_teachers_do_not_go_together(tmp_path: Path) -> None:
    for name in ("shards", "more"):
        write_corpus(tmp_path / name, LENGTHS)
    write_states(tmp_path / "shards", tmp_path / "states", "bf16", [("train-000000.tar", 0, 7)])
    write_states(tmp_path / "more", tmp_path / "others", "bf16", [("train-000000.tar", 0, 7)])
    both = (SourceConfig(str(tmp_path / "more"), hidden_states=str(tmp_path / "others")),)
    stream(tmp_path, more_sources=both)
    path = tmp_path / "others" / "manifest.json"
    write_json(path, {**json.loads(path.read_text()), "layer": -1})
    with pytest.raises(DataError, match="others: states with layer -1, those of .*states have None"):
        stream(tmp_path, more_sources=both)


def test_states_for_other_windows_tokenizers_or_shards_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "shards", LENGTHS)
    write_states(tmp_path / "shards", tmp_path / "states", "bf16", [("train-000000.tar", 0, 2)])
    stream(tmp_path)
    with pytest.raises(DataError, match=r"windows of 32 tokens.*--max-tokens 48"):
        stream(tmp_path, max_tokens=48)
    path = tmp_path / "states" / "manifest.json"
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "tokenizer_fingerprint": "other"})
    with pytest.raises(DataError, match="another tokenizer"):
        stream(tmp_path)
    write_json(path, {**manifest, "format_version": 1})
    with pytest.raises(DataError, match="format 1, this code reads format 2 of what data_tools.extract_hidden_states"):
        stream(tmp_path)
    manifest["splits"]["train"]["shards"][0]["samples"] = 3
    write_json(path, manifest)
    damaged = stream(tmp_path)
    with pytest.raises(DataError, match=r"train-000000-00000000.tar: holds 2 documents' states.*the manifest says 3"):
        read_all(damaged)
    (tmp_path / "states" / "train-000000-00000000.tar").unlink()
    with pytest.raises(DataError, match="no such file of teacher states"):
        stream(tmp_path)
    write_json(path, {**manifest, "splits": {}})
    stream(tmp_path)
    write_corpus(tmp_path / "shards", LENGTHS[::-1])
    write_json(path, {**manifest, "splits": {"train": {"of": "x", "shards": []}}})
    with pytest.raises(DataError, match="its train states belong to other shards"):
        stream(tmp_path)


def test_no_table_of_documents_is_kept(tmp_path: Path) -> None:
    """Memory a document: what the reader holds for 20,000 documents' states beyond what it holds for 200."""
    import tracemalloc

    held = []
    for count in (200, 20_000):
        root = tmp_path / str(count)
        write_corpus(root / "shards", [3] * count, per_shard=count)
        write_states(root / "shards", root / "states", "int8", [("train-000000.tar", 0, count)])
        stream(root).batch((warm := stream(root)).plan(0), slice(None))  # builds the indexes
        del warm
        tracemalloc.start()
        reader = stream(root)
        reader.batch(reader.plan(0), slice(None))
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert (held[1] - held[0]) / (20_000 - 200) <= 24
