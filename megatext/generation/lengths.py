"""How long texts are: the lengths of training's windows go with a model, and a text may draw its own from them."""

import json
from pathlib import Path

import numpy as np

from megatext import rng
from megatext.config import ConfigError
from megatext.data import DataError
from megatext.data.stream import DataConfig, TokenStream

FILE = "lengths.json"
WINDOWS = 20_000
"""Windows that a distribution is measured on, at most: the first of the order, which is random."""
LEVELS = 201
"""Quantiles that are stored."""


def write_lengths(data: DataConfig, directory: Path) -> None:
    """Write the quantiles of the lengths, in tokens, of training's windows beside an exported model; where the shards
    are not at hand, say so and do without."""
    try:
        stream = TokenStream(data.without_states(), seed=0, rows_per_step=1)
    except DataError as error:
        print(f"warning: no {FILE}, so that length sampled will not work: {error}")
        return
    count = min(WINDOWS, sum(source.windows for source in stream.sources))
    quantiles = np.quantile(stream.locate(0, count).length, np.linspace(0, 1, LEVELS), method="nearest")
    (directory / FILE).write_text(json.dumps({"window_tokens": quantiles.astype(int).tolist()}) + "\n")


def read_lengths(directory: Path) -> list[int]:
    """Quantiles at equal steps, ascending; [] where a model has none."""
    path = directory / FILE
    return list(json.loads(path.read_text())["window_tokens"]) if path.is_file() else []


def draw_target_tokens(quantiles: list[int], prompt_tokens: int, most: int, seed: int) -> int:
    """Tokens to write after a prompt: a whole length is drawn from those of training that are longer than the prompt,
    at most `most` of it are written. Where none is longer, `most`. Raises ConfigError without quantiles."""
    if not quantiles:
        raise ConfigError(
            "length sampled: the model was exported without the lengths of its training; export it again, or use eos"
        )
    longer = [length for length in quantiles if length > prompt_tokens]
    if not longer:
        return most
    drawn = longer[int(rng.uniform(seed, "length", [0])[0] * len(longer))]
    return min(most, drawn - prompt_tokens)
