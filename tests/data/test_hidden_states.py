"""Teacher states: storage, alignment with packed windows, partial coverage, refusal of others' states."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates, HiddenStatesWriter, Storage, from_stored, to_stored
from megatext.data.stream import DataConfig, TokenStream
from tests.data.corpus import write_corpus

LENGTHS = [5, 70, 33, 12, 48, 100, 9, 27, 61, 30]
DESCRIPTION: dict[str, Any] = {
    "teacher": "t",
    "teacher_fingerprint": "f",
    "layer": -3,
    "width": 8,
    "max_tokens": 32,
    "tokenizer_fingerprint": "test",
}


def states_of(tokens: Any) -> torch.Tensor:
    """A state that tells its token: `[tokens, 8]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4096, 8, generator=generator)[torch.as_tensor(tokens, dtype=torch.int64)]


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
    writer = HiddenStatesWriter(tmp_path / "states", DESCRIPTION, split="train", storage=storage, shard_tokens=100)
    for d, tokens in enumerate(documents):
        if d == 3:
            continue  # no states for this document, and only 40 for the next
        writer.add(f"train-doc-{d}", states_of(tokens[:40] if d == 4 else tokens))
    writer.finish()
    assert len(list((tmp_path / "states").glob("train-*.tar"))) > 2
    config = DataConfig(str(tmp_path / "shards"), row_tokens=64, max_tokens=32, hidden_states=str(tmp_path / "states"))
    stream = TokenStream(config, seed=0, rows_per_step=2)
    sample, covered = 0, 0
    while sample < stream.samples_per_epoch:
        plan = stream.plan(sample)
        batch = stream.batch(plan, slice(None))
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
                if key == "train-doc-3":
                    assert not here.any()
                elif key == "train-doc-4":
                    assert int(here.sum()) in (32, 8)
                else:
                    assert here.all()
        assert not valid[batch.segment == -1].any()
        covered += int(valid.sum())
        sample = plan.next_sample
    assert covered >= sum(LENGTHS) - 12 - 8


def test_states_for_other_windows_or_tokenizers_are_refused(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "shards", LENGTHS)
    writer = HiddenStatesWriter(tmp_path / "states", DESCRIPTION, split="train", storage="bf16")
    writer.add("train-doc-0", states_of(documents[0]))
    writer.finish()

    def stream(max_tokens: int) -> TokenStream:
        config = DataConfig(
            str(tmp_path / "shards"), row_tokens=64, max_tokens=max_tokens, hidden_states=str(tmp_path / "states")
        )
        return TokenStream(config, seed=0, rows_per_step=2)

    stream(32)
    with pytest.raises(DataError, match=r"windows of 32 tokens.*--max-tokens 48"):
        stream(48)
    with pytest.raises(DataError, match="another tokenizer"):
        HiddenStates(tmp_path / "states").check(tokenizer_fingerprint="other", max_tokens=32)
    with pytest.raises(DataError, match="holds no teacher states"):
        HiddenStates(tmp_path / "shards")
    with pytest.raises(DataError, match="layer = -3, not -1"):
        HiddenStatesWriter(tmp_path / "states", {**DESCRIPTION, "layer": -1}, split="test", storage="bf16")
    with pytest.raises(DataError, match="already holds states of split 'train'"):
        HiddenStatesWriter(tmp_path / "states", DESCRIPTION, split="train", storage="bf16")
    (tmp_path / "states" / "train-000000.tar").unlink()  # as a stage does that is run again
    HiddenStatesWriter(tmp_path / "states", DESCRIPTION, split="train", storage="bf16").abandon()
