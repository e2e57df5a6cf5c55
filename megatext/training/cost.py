"""What the training of an exported model took, with that of every model it stands on."""

import json
from pathlib import Path
from typing import Any

from megatext.config import to_dict
from megatext.data import DataError
from megatext.data.hidden_states import read_states_manifest
from megatext.data.remote import local_folder
from megatext.data.stream import TokenStream
from megatext.recipes import meta_module
from megatext.recipes.base import Recipe
from megatext.recipes.pretrained import weights_hash
from megatext.training.estimate import row_flops
from megatext.training.run_config import RunConfig

FILE = "training.json"


def write_cost(config: RunConfig, recipe: Recipe, steps: int, directory: Path) -> None:
    """Write it beside a model that was exported after so many steps; where the shards are not at hand, say so and do
    without.

    `flops` are by weights_hash, the model's own and its ancestors', so that one which several stand on counts once:
    forward and backward passes, recomputation, frozen networks; not the optimizer, nor the extraction of teacher
    states. `unknown` are ancestors that do not tell theirs."""
    try:
        vocab_size = TokenStream(config.data.without_states(), seed=0, rows_per_step=1).vocab_size
    except DataError as error:
        print(f"warning: no {FILE}, so that nothing will tell what this model took: {error}")
        return
    rows, own = config.training.rows_per_step * steps, weights_hash(directory)
    flops = {own: row_flops(config, meta_module(config, vocab_size), vocab_size).total * rows}
    unknown: list[str] = []
    for name, cost in _ancestors(config, recipe).items():
        flops |= cost["flops"] if cost else {}
        unknown += cost["unknown"] if cost else [name]
    content = {"steps": steps, "tokens": rows * config.data.row_tokens, "flops": flops, "unknown": unknown}
    (directory / FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_cost(directory: str | Path) -> dict[str, Any] | None:
    """What `write_cost` wrote; None where it did not."""
    path = Path(directory) / FILE
    return json.loads(path.read_text()) if path.is_file() else None  # type: ignore[no-any-return]


def total_flops(directory: str | Path) -> float | None:
    """Of a model and all that it stands on; None where that is not known."""
    cost = read_cost(directory)
    return None if cost is None or cost["unknown"] else float(sum(cost["flops"].values()))


def _ancestors(config: RunConfig, recipe: Recipe) -> dict[str, dict[str, Any] | None]:
    """The costs of the models that a run stands on, and of the teacher whose states it reads, by name."""
    found: dict[str, dict[str, Any] | None] = {}
    for key in recipe.built_on:
        value: Any = to_dict(config)
        for part in key.split("."):
            value = value[part]
        found[key] = read_cost(value)
    if recipe.reads_states and "ldlm.language_model" not in found:
        for place in config.data.states():
            found[place] = read_states_manifest(local_folder(place)).get("teacher_training")
    return found
