"""Teacher states for REPA: `python -m data_tools.extract_hidden_states --shards DIR --model M --layer -3 --output DIR`.

Runs a causal language model over the same windows that the stream cuts and stores one layer's hidden states.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.hidden_states import HiddenStatesWriter, Storage, from_stored, to_stored
from megatext.data.shards import read_manifest
from megatext.data.tar_index import TarIndex
from megatext.data.windows import cut
from megatext.tokenizer import load_tokenizer

ASSUMED_FLOPS = 300e12
"""Sustained FLOP/s of one accelerator that `--estimate` reckons with (bf16, about 40 % of an H100's peak)."""


@dataclass(frozen=True)
class Extraction:
    """What is extracted."""

    shards: str
    """Directory of token shards."""
    model: str
    """Directory of a Hugging Face causal language model, or its name on the hub."""
    output: str
    """Directory for the states."""
    layer: int = -3
    """Index into transformers' `hidden_states`: 0 is the embedding, -1 the last layer after its norm."""
    split: str = "train"
    """The split to read."""
    max_tokens: int = 1024
    """Window length; must equal data.max_tokens of the training run."""
    limit_tokens: int | None = None
    """Stop after the document in which so many tokens are reached."""
    storage: Storage = "bf16"
    """bf16: 2 bytes a channel; int8: 1 byte a channel and 4 bytes a token."""
    batch_tokens: int = 8192
    """Tokens in one forward pass, padding included."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def fingerprint(model: str) -> str:
    """sha256 over the config and the weight files of a local model; the name itself for a model on the hub."""
    path = Path(model)
    if not path.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _documents(options: Extraction) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tokens) in the shards' order, up to the limit."""
    manifest = read_manifest(options.shards)
    if options.split not in manifest["splits"]:
        raise DataError(f"{options.shards}: no split {options.split!r}, only {', '.join(manifest['splits'])}")
    seen = 0
    for entry in manifest["splits"][options.split]["shards"]:
        shard = TarIndex(Path(options.shards) / entry["file"])
        for document in range(len(shard)):
            if options.limit_tokens is not None and seen >= options.limit_tokens:
                return
            tokens = shard.array(document)
            seen += len(tokens)
            yield shard.key(document), tokens


def _total_tokens(options: Extraction) -> int:
    total: int = read_manifest(options.shards)["splits"][options.split]["tokens"]
    return total if options.limit_tokens is None else min(total, options.limit_tokens)


def bytes_per_token(width: int, storage: Storage) -> int:
    """Stored bytes of one token's state."""
    return 2 * width if storage == "bf16" else width + 4


def estimate(options: Extraction) -> dict[str, float]:
    """Tokens, bytes, FLOPs and accelerator hours, without loading any weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(options.model).get_text_config()
    with torch.device("meta"):
        network = AutoModel.from_config(config)
    parameters = sum(p.numel() for p in network.parameters()) - network.get_input_embeddings().weight.numel()
    tokens = _total_tokens(options)
    flops = 2.0 * parameters * tokens
    return {
        "tokens": tokens,
        "bytes": tokens * bytes_per_token(config.hidden_size, options.storage),
        "flops": flops,
        "accelerator_hours": flops / ASSUMED_FLOPS / 3600,
    }


def load_teacher(options: Extraction) -> Any:
    """The model's trunk without its output head, in evaluation mode; bf16 on accelerators, fp32 on CPU."""
    from transformers import AutoModelForCausalLM

    manifest = read_manifest(options.shards)
    try:
        found = load_tokenizer(options.model).fingerprint()
    except (OSError, ValueError) as error:
        raise DataError(f"--model {options.model}: no tokenizer can be loaded from it ({error})") from error
    if found != manifest["tokenizer"]["fingerprint"]:
        raise DataError(
            f"--model {options.model}: its tokenizer is not the one of {options.shards}; "
            f"shard the text with --tokenizer {options.model}"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    teacher: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).base_model.to(device).eval()
    layers = teacher.config.get_text_config().num_hidden_layers
    if not -layers - 1 <= options.layer <= layers:
        raise DataError(f"--layer {options.layer}: the model has hidden states {-layers - 1} to {layers}")
    return teacher


@torch.no_grad()
def window_states(teacher: Any, windows: list[np.ndarray], layer: int) -> list[Tensor]:
    """The layer's states `[tokens, width]` of each window (fp32, CPU); padded to the longest in one forward pass."""
    longest = max(map(len, windows))
    ids = np.zeros((len(windows), longest), np.int64)
    mask = np.zeros((len(windows), longest), np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    device = teacher.get_input_embeddings().weight.device
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
    states = teacher(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer].float().cpu()
    return [states[row, : len(window)] for row, window in enumerate(windows)]


def _document_states(teacher: Any, documents: list[np.ndarray], options: Extraction) -> list[Tensor]:
    """States of whole documents: all their windows, run in order of length so that little is padding."""
    windows = cut(np.array([len(d) for d in documents]), options.max_tokens)
    states: list[Tensor] = [torch.empty(0)] * len(windows)
    by_length = np.argsort(windows.length, kind="stable").tolist()
    while by_length:
        longest = int(windows.length[by_length[-1]])
        count = max(1, options.batch_tokens // longest)
        batch, by_length = by_length[-count:], by_length[:-count]
        pieces = [documents[windows.document[w]][windows.start[w] :][: windows.length[w]] for w in batch]
        for window, result in zip(batch, window_states(teacher, pieces, options.layer), strict=True):
            states[window] = result
    return [torch.cat([states[w] for w in np.flatnonzero(windows.document == d)]) for d in range(len(documents))]


def extract(options: Extraction) -> dict[str, float]:
    """Write the states of a split; returns tokens, bytes and the mean cosine between stored and true states."""
    teacher = load_teacher(options)
    width = teacher.config.get_text_config().hidden_size
    description = {
        "teacher": Path(options.model).name,
        "teacher_fingerprint": fingerprint(options.model),
        "layer": options.layer,
        "width": width,
        "max_tokens": options.max_tokens,
        "tokenizer_fingerprint": read_manifest(options.shards)["tokenizer"]["fingerprint"],
    }
    writer = HiddenStatesWriter(options.output, description, split=options.split, storage=options.storage)
    bar = tqdm(total=_total_tokens(options), desc="extract", unit="tok", unit_scale=True, dynamic_ncols=True)
    tokens, cosines = 0, 0.0
    keys: list[str] = []
    documents: list[np.ndarray] = []

    def flush() -> None:
        nonlocal tokens, cosines
        for key, states in zip(keys, _document_states(teacher, documents, options), strict=True):
            writer.add(key, states)
            stored = to_stored(states, options.storage)
            kept = from_stored(stored["hidden"], stored.get("scale")).float()
            cosines += float(torch.cosine_similarity(kept, states, dim=1).sum())
            tokens += len(states)
            bar.update(len(states))
        keys.clear()
        documents.clear()

    try:
        for key, ids in _documents(options):
            keys.append(key)
            documents.append(ids)
            if sum(map(len, documents)) >= 16 * options.batch_tokens:
                flush()
        if documents:
            flush()
        writer.finish()
    finally:
        bar.close()
        writer.abandon()
    size = tokens * bytes_per_token(width, options.storage)
    return {"tokens": tokens, "bytes": size, "cosine": cosines / max(tokens, 1)}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.extract_hidden_states", description=__doc__)
    parser.add_argument("--shards", required=True, help="directory of token shards")
    parser.add_argument("--model", required=True, help="Hugging Face causal LM: directory or name")
    parser.add_argument("--output", required=True, help="directory for the states")
    parser.add_argument("--layer", type=int, default=-3, help="index into hidden_states; -3 is the third-to-last")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max-tokens", type=int, default=1024, help="window length: the data.max_tokens to train with")
    parser.add_argument("--limit-tokens", type=int, help="stop after so many tokens")
    parser.add_argument("--storage", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens in one forward pass")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--estimate", action="store_true", help="print tokens, bytes and accelerator hours, then stop")
    arguments = vars(parser.parse_args(argv))
    only_estimate = arguments.pop("estimate")
    with cli_errors():
        options = Extraction(**arguments)
        if only_estimate:
            figures = estimate(options)
            print(
                f"{figures['tokens']:,.0f} tokens, {figures['bytes'] / 1e9:,.3f} GB of states ({options.storage}), "
                f"{figures['flops']:.3g} FLOPs, {figures['accelerator_hours']:.3g} accelerator hours at "
                f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s"
            )
            return
        figures = extract(options)
        print(
            f"{options.output}: {figures['tokens']:,.0f} tokens, {figures['bytes'] / 1e9:,.3f} GB, "
            f"cosine between stored and true states {figures['cosine']:.6f}"
        )


if __name__ == "__main__":
    main()
