"""Extraction against the model run by hand, one window at a time."""

from pathlib import Path

import pytest
import torch

from data_tools import extract_hidden_states
from data_tools.extract_hidden_states import Extraction, estimate, extract
from data_tools.shard import shard
from data_tools.train_tokenizer import train
from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates
from megatext.data.tar_index import TarIndex
from tests.data_tools.test_shard import TEXTS, json_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal LM of four layers with its tokenizer, and the shards `model/shards` made with it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=330,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    train(TEXTS, 305).save(directory)
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS[:60]))
    shard([str(directory / "a.jsonl")], str(directory), directory / "shards", test_fraction=0)
    return directory


def options(model: Path, output: Path, **changed: object) -> Extraction:
    return Extraction(str(model / "shards"), str(model), str(output), **{"max_tokens": 24, **changed})  # type: ignore[arg-type]


def test_states_equal_the_model_run_by_hand(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    figures = extract(options(model, tmp_path / "states", batch_tokens=100))
    assert figures["cosine"] > 0.9999
    states = HiddenStates(tmp_path / "states")
    assert states.width == 16
    states.check(tokenizer_fingerprint=states.manifest["tokenizer_fingerprint"], max_tokens=24)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = TarIndex(model / "shards" / "train-000000.tar")
    assert figures["tokens"] == int(tokens.lengths.sum())
    assert int(tokens.lengths.max()) > 48, "some documents are cut"
    for document in range(0, len(tokens), 7):
        ids = torch.from_numpy(tokens.array(document).astype("int64"))
        for start in range(0, len(ids), 24):
            window = ids[start : start + 24]
            with torch.no_grad():
                true = network(window[None], output_hidden_states=True).hidden_states[-3][0]
            found = states.read(tokens.key(document), start, start + 24).float()
            assert torch.allclose(found, true, atol=0.02, rtol=0.01)


def test_subset_int8_and_second_split(model: Path, tmp_path: Path) -> None:
    figures = extract(options(model, tmp_path, limit_tokens=300, storage="int8"))
    assert 300 <= figures["tokens"] < 400
    assert figures["cosine"] > 0.999
    extract(options(model, tmp_path, split="validation", storage="int8"))
    assert set(HiddenStates(tmp_path).manifest["splits"]) == {"train", "validation"}


def test_estimate_and_errors(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = estimate(options(model, tmp_path, limit_tokens=1000))
    assert figures["tokens"] == 1000
    assert figures["bytes"] == 32_000
    arguments = [
        "--shards",
        str(model / "shards"),
        "--model",
        str(model),
        "--output",
        str(tmp_path / "s"),
        "--estimate",
    ]
    extract_hidden_states.main(arguments)
    assert "accelerator hours" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="--layer 9"):
        extract(options(model, tmp_path, layer=9))
    train(TEXTS, 303).save(tmp_path)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(DataError, match="its tokenizer is not the one of"):
        extract(Extraction(str(model / "shards"), str(tmp_path), str(tmp_path / "s")))
