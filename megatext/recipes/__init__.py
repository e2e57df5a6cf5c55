"""One system a file. The registry finds a run's recipe from the class of its configuration."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatext.config import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from megatext.recipes.base import Pass, Recipe
    from megatext.training.run_config import RunConfig

_MODULES = {
    "PretrainLMConfig": "megatext.recipes.causal_lm",
    "PretrainVAEConfig": "megatext.recipes.text_vae",
    "PretrainDiTConfig": "megatext.recipes.text_dit",
    "PretrainColaConfig": "megatext.recipes.cola_dlm",
    "PretrainLDLMConfig": "megatext.recipes.ldlm",
}
"""Configuration class -> the module that defines it, with four functions: `build(config) -> Recipe`;
`needed(config) -> list[str]`, the directories that must be there before; `make(config, vocab_size) -> nn.Module`, the
module that `build` would train, also on the meta device and before they are there; and
`passes(config, module, vocab_size) -> list[Pass]`, what a step computes with it."""


def config_class(name: str) -> "type[RunConfig]":
    """The configuration class of a saved run by its name. Raises ConfigError."""
    if name not in _MODULES:
        raise ConfigError(f"no recipe has a configuration called {name}; known are {', '.join(_MODULES)}")
    found: type[RunConfig] = getattr(import_module(_MODULES[name]), name)
    return found


def build_recipe(config: "RunConfig") -> "Recipe":
    """The recipe that a configuration describes, randomly initialised from its seed."""
    recipe: Recipe = _module_of(config).build(config)
    return recipe


def needed_by(config: "RunConfig") -> list[str]:
    """The directories that a run reads: shards, teacher states, models it builds on."""
    found: list[str] = _module_of(config).needed(config)
    return found


def meta_module(config: "RunConfig", vocab_size: int) -> "nn.Module":
    """The module that a run would train, without memory for its weights: for what it costs."""
    import torch

    with torch.device("meta"):
        module: nn.Module = _module_of(config).make(config, vocab_size)
    return module


def passes_of(config: "RunConfig", module: "nn.Module", vocab_size: int) -> "list[Pass]":
    """What every training step computes, on one row of the meta device: for what it costs."""
    import torch

    with torch.device("meta"):
        found: list[Pass] = _module_of(config).passes(config, module, vocab_size)
    return found


def _module_of(config: "RunConfig") -> Any:
    name = type(config).__name__
    config_class(name)
    return import_module(_MODULES[name])
