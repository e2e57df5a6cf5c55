"""Extraction against the model run by hand, on any number of ranks, through interruptions."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools import extract_hidden_states
from data_tools.extract_hidden_states import estimate, extract
from data_tools.pieces import Extraction, plan
from data_tools.shard import shard
from data_tools.train_tokenizer import train
from megatext.config import ConfigError, from_dict
from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates, read_states_manifest
from megatext.data.shards import read_manifest, split_fingerprint
from megatext.data.tar_index import TarIndex
from megatext.recipes.text_vae import PretrainVAEConfig, teacher_of
from megatext.training.engine import _free_port
from tests.data_tools.test_shard import ROOT, TEXTS, json_lines, tree

SMALL: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def make_model(directory: Path, architecture: str) -> Path:
    """A random model with its tokenizer, and the shards `directory/shards` made with it."""
    import transformers

    torch.manual_seed(0)
    model: Any
    if architecture == "qwen3":
        more = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2}
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **more))
    elif architecture == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=40))
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=330, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2)
        )
    model.save_pretrained(directory)
    train(TEXTS, 305).save(directory)
    (directory / "a.jsonl").write_bytes(json_lines(TEXTS[:60]))
    fractions = {"test_fraction": 0.0, "validation_fraction": 0.1}
    shard([str(directory / "a.jsonl")], str(directory), directory / "shards", shard_tokens=1000, **fractions)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3")


def options(model: Path, output: Path, **changed: object) -> Extraction:
    return Extraction(str(model / "shards"), str(model), str(output), **{"max_tokens": 24, **changed})  # type: ignore[arg-type]


def states_by_hand(network: Any, ids: np.ndarray, layer: int = -3) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        return network(tokens, output_hidden_states=True).hidden_states[layer][0].float()


def assert_states_of(network: Any, shards: Path, output: Path, max_tokens: int, *, causal: bool = True) -> None:
    """Every 7th document's stored states are its windows' own; for a causal model, also those of cut windows."""
    states = HiddenStates(str(output), "train")
    states.check(
        tokenizer_fingerprint=read_manifest(shards)["tokenizer"]["fingerprint"],
        max_tokens=max_tokens,
        of=split_fingerprint(read_manifest(shards), "train"),
    )
    windows = 0
    for path in sorted(shards.glob("train-*.tar")):
        tokens = TarIndex(path)
        for document in range(0, len(tokens), 7):
            ids = tokens.array(document)
            for start in range(0, len(ids), max_tokens):
                window = ids[start : start + max_tokens]
                found = states.read(path.name, document, start, start + max_tokens).float()
                assert torch.allclose(found, states_by_hand(network, window), atol=0.02, rtol=0.01)
                cut = 1 + len(window) // 3
                truncated = states_by_hand(network, window[:cut])
                assert torch.allclose(found[:cut], truncated, atol=0.02, rtol=0.01) or not causal
                windows += 1
    assert windows > 8


def test_states_equal_the_model_run_by_hand(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    extract(options(model, tmp_path / "states", batch_tokens=100, piece_tokens=300), ["train", "validation"])
    manifest = read_states_manifest(tmp_path / "states")
    shards = read_manifest(model / "shards")["splits"]
    assert {name: content["tokens"] for name, content in manifest["splits"].items()} == {
        name: shards[name]["tokens"] for name in ("train", "validation")
    }
    train_states = manifest["splits"]["train"]
    assert len(train_states["shards"]) > len(shards["train"]["shards"]) > 1
    assert train_states["storage_cosine"] > 0.9999
    assert manifest["causal"] is True
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    assert_states_of(network, model / "shards", tmp_path / "states", 24)
    lengths = np.concatenate([TarIndex(path).lengths for path in (model / "shards").glob("train-*.tar")])
    assert int(lengths.max()) > 48, "some documents are cut"
    everything = torch.cat(
        [
            states_by_hand(network, index.array(d)[a : a + 24]).double()
            for index in map(TarIndex, sorted((model / "shards").glob("train-*.tar")))
            for d in range(len(index))
            for a in range(0, int(index.lengths[d]), 24)
        ]
    )
    assert torch.allclose(torch.tensor(train_states["mean"]).double(), everything.mean(0), atol=1e-5)
    assert torch.allclose(torch.tensor(train_states["std"]).double(), everything.std(0, correction=0), atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 1])
def test_other_layers_equal_the_model_run_by_hand(model: Path, tmp_path: Path, layer: int) -> None:
    """-3, the default, is what the tests beside this one read."""
    from transformers import AutoModelForCausalLM

    extract(options(model, tmp_path, layer=layer), ["validation"])
    assert read_states_manifest(tmp_path)["layer"] == layer
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    states = HiddenStates(str(tmp_path), "validation")
    for path in (model / "shards").glob("validation-*.tar"):
        tokens = TarIndex(path)
        for document in range(len(tokens)):
            window = tokens.array(document)[:24]
            found = states.read(path.name, document, 0, len(window)).float()
            assert torch.allclose(found, states_by_hand(network, window, layer), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_encoders_too(architecture: str, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, T5EncoderModel

    directory = make_model(tmp_path / "model", architecture)
    extract(options(directory, tmp_path / "states"), ["train"])
    assert read_states_manifest(tmp_path / "states")["causal"] is False
    network = (BertForMaskedLM if architecture == "bert" else T5EncoderModel).from_pretrained(directory).eval()
    assert_states_of(network, directory / "shards", tmp_path / "states", 24, causal=False)
    if architecture == "bert":
        with pytest.raises(DataError, match="was made for 40 positions at most"):
            extract(options(directory, tmp_path / "s", max_tokens=41), ["train"])
    config = {"run_dir": "x", "max_steps": 1, "data": {"shards": "x", "hidden_states": str(tmp_path / "states")}}
    assert teacher_of(from_dict(PretrainVAEConfig, {**config, "vae": {"repa_weight": 1.0}}, "x")) is not None
    with pytest.raises(ConfigError, match="its teacher is not causal"):
        teacher_of(from_dict(PretrainVAEConfig, {**config, "vae": {"repa_weight": 1.0, "truncation": 0.5}}, "x"))


def test_a_real_model(tmp_path: Path, shared_data: Path) -> None:
    """A trained Llama of 260,032 parameters, over the stories that it was trained on, with its own tokenizer."""
    from transformers import AutoModelForCausalLM

    directory = shared_data / "tiny_lm" / "stories260K_hf"
    shard([str(shared_data / "tinystories" / "stories_3000.jsonl.gz")], str(directory), tmp_path / "shards", limit=60)
    chosen = Extraction(str(tmp_path / "shards"), str(directory), str(tmp_path / "states"), max_tokens=128)
    extract(chosen, ["train"], verify=5)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert_states_of(network, tmp_path / "shards", tmp_path / "states", 128)


def command(model: Path, output: Path, *more: str) -> list[str]:
    program = ["-m", "data_tools.extract_hidden_states", "--shards", str(model / "shards"), "--model", str(model)]
    return [*program, "--output", str(output), "--max-tokens", "24", "--piece-tokens", "200", *more]


def contents(output: Path) -> dict[str, Any]:
    """All files, the figures of the manifest to 6 digits: another number of threads adds in another order."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return round(value, 6) if isinstance(value, float) else value

    whole = {name: digest for name, digest in tree(output).items() if not name.startswith(".")}
    return {**whole, "manifest.json": rounded(read_states_manifest(output))}


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_and_interruptions_leave_the_same_bytes(model: Path, tmp_path: Path) -> None:
    extract(options(model, tmp_path / "whole", piece_tokens=200), ["train", "validation"])
    expected = contents(tmp_path / "whole")
    assert len(expected) > 8

    output = tmp_path / "killed"
    kills = 0
    while not (output / "manifest.json").exists() or "validation" not in read_states_manifest(output)["splits"]:
        process = subprocess.Popen(
            [sys.executable, *command(model, output)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = len(list(output.glob("*.tar")))
        while process.poll() is None:
            if len(list(output.glob("*.tar"))) >= before + 3:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills >= 2
    subprocess.run([sys.executable, *command(model, output)], cwd=ROOT, check=True, capture_output=True)
    assert contents(output) == expected

    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_gpus", "2"]
    launcher += ["--master_port", str(_free_port()), "--module"]
    together = tmp_path / "together"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command(model, together, "--verify", "4")[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(together) == expected
    assert re.search(r"train: 4 documents computed again: cosine 0\.9999\d\d on average", done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    """A book of 80,000 tokens has 164 MB of states in fp32; extraction holds a few groups of windows of them."""
    import transformers

    shape = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"vocab_size": 330, "num_attention_heads": 1, "num_key_value_heads": 1}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads)).save_pretrained(tmp_path / "model")
    train(TEXTS, 305).save(tmp_path / "model")
    peaks = []
    for words in (10_000, 160_000):
        text = " ".join(TEXTS[i % 240].split()[0] for i in range(words // 2))
        (tmp_path / f"{words}.txt").write_text(text)
        shards = tmp_path / f"shards-{words}"
        shard([str(tmp_path / f"{words}.txt")], str(tmp_path / "model"), shards, validation_fraction=0, test_fraction=0)
        program = (
            "import resource, sys\nfrom data_tools.extract_hidden_states import main\nmain(sys.argv[1:])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        )
        arguments = [
            "--shards",
            str(shards),
            "--model",
            str(tmp_path / "model"),
            "--output",
            str(tmp_path / f"s{words}"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--max-tokens=256", "--batch-tokens=1024", "--layer=-1"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert read_manifest(shards)["splits"]["train"]["documents"] == 1
        peaks.append(int(done.stdout.split()[-1]))
    states = read_states_manifest(tmp_path / "s160000")["splits"]["train"]["tokens"] * 512 * 4
    assert states > 150e6
    assert peaks[1] - peaks[0] < 0.25 * states


def test_subset_int8_and_another_limit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(model, tmp_path, limit_tokens=300, storage="int8", piece_tokens=100)
    assert sum(piece.tokens for piece in plan(chosen, "train")) >= 300
    extract(chosen, ["train"], verify=3)
    assert "train: 3 documents computed again: cosine 0.99" in capsys.readouterr().out
    content = read_states_manifest(tmp_path)["splits"]["train"]
    assert 300 <= content["tokens"] < 400
    assert content["storage_cosine"] > 0.999
    before = tree(tmp_path)
    extract(chosen, ["train"])
    assert "already complete" in capsys.readouterr().out
    assert tree(tmp_path) == before
    with pytest.raises(DataError, match="already holds states of split 'train' of --limit-tokens 300"):
        extract(options(model, tmp_path, storage="int8"), ["train"])
    with pytest.raises(DataError, match="holds states with storage = 'int8', not 'bf16'"):
        extract(options(model, tmp_path), ["validation"])
    with pytest.raises(DataError, match="holds states with layer = -3, not -2"):
        extract(options(model, tmp_path, limit_tokens=300, storage="int8", layer=-2), ["train"])
    (tmp_path / content["shards"][1]["file"]).unlink()  # as a stage does that is run again
    extract(chosen, ["train"])
    assert tree(tmp_path) == before


def test_verify_finds_states_of_something_else(model: Path, tmp_path: Path) -> None:
    extract(options(model, tmp_path), ["train"])
    (path,) = tmp_path.glob("train-000000-*.tar")
    index = TarIndex(path, ".hidden.npy")
    content = bytearray(path.read_bytes())
    for place in range(int(index.offsets[0]) + 1, int(index.offsets[0]) + 2 * 16 * int(index.lengths[0]), 2):
        content[place] ^= 0x80  # the signs
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="the train states are not those of this model and these shards"):
        extract(options(model, tmp_path), ["train"], verify=2)


def test_a_full_disk_leaves_nothing_half_written(model: Path, tmp_path: Path) -> None:
    import resource

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = subprocess.run(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys; "
         "from data_tools.extract_hidden_states import main; main(sys.argv[1:])", *command(model, tmp_path / "s")[2:]],
        cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit_file_size,
    )  # fmt: skip
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        f"error: {tmp_path / 's' / 'train-000000-00000000.tar'}: cannot be written (File too large)"
    )
    assert read_states_manifest(tmp_path / "s")["splits"] == {}
    assert not list((tmp_path / "s").glob("*.tar")) and not list((tmp_path / "s").glob(".*.partial"))


def test_estimate_and_errors(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = estimate(options(model, tmp_path, limit_tokens=1000), ["train"], "H100")
    assert 1000 <= figures["tokens"] < 1100
    assert figures["bytes"] == 32 * figures["tokens"]
    block = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2 * 8  # attention, MLP, norms
    assert figures["flops"] >= 2 * (4 * block + 16) * figures["tokens"]
    assert figures["flops"] <= 2 * (4 * block + 16) * figures["tokens"] + 4 * 4 * 16 * 24 * figures["tokens"]
    assert figures["gpu_hours"] == pytest.approx(figures["flops"] / (0.4 * 989e12) / 3600)
    arguments = ["--shards", str(model / "shards"), "--model", str(model), "--output", str(tmp_path / "s")]
    extract_hidden_states.main([*arguments, "--max-tokens", "24", "--estimate", "--card", "A100"])
    assert re.search(r"hours of one A100 at 40% of its 312 TFLOP/s", capsys.readouterr().out)
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="--layer 9"):
        extract(options(model, tmp_path, layer=9), ["train"])
    with pytest.raises(DataError, match="no split 'dev', only"):
        extract(options(model, tmp_path), ["dev"])
    train(TEXTS, 303).save(tmp_path)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(DataError, match="its tokenizer is not the one of the shards"):
        extract(Extraction(str(model / "shards"), str(tmp_path), str(tmp_path / "s")), ["train"])
