"""One system a file. The registry finds a run's recipe from the class of its configuration."""

from importlib import import_module
from typing import TYPE_CHECKING

from megatext.config import ConfigError

if TYPE_CHECKING:
    from megatext.recipes.base import Recipe
    from megatext.training.trainer import RunConfig

_MODULES = {
    "PretrainLMConfig": "megatext.recipes.causal_lm",
    "PretrainVAEConfig": "megatext.recipes.text_vae",
    "PretrainDiTConfig": "megatext.recipes.text_dit",
}
"""Configuration class -> the module that defines it, with a function `build(config) -> Recipe`."""


def config_class(name: str) -> "type[RunConfig]":
    """The configuration class of a saved run by its name. Raises ConfigError."""
    if name not in _MODULES:
        raise ConfigError(f"no recipe has a configuration called {name}; known are {', '.join(_MODULES)}")
    found: type[RunConfig] = getattr(import_module(_MODULES[name]), name)
    return found


def build_recipe(config: "RunConfig") -> "Recipe":
    """The recipe that a configuration describes, randomly initialised from its seed."""
    name = type(config).__name__
    config_class(name)
    recipe: Recipe = import_module(_MODULES[name]).build(config)
    return recipe
