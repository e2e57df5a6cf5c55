"""The program behind every launch/pretrain_*.py: read the configuration, build its recipe, train."""

from megatext.config import cli_errors, load_config
from megatext.recipes import build_recipe, config_class


def launch(config_name: str, argv: list[str]) -> None:
    """Train what `argv` configures, a `config_name` of the registry of recipes. Every process of the run calls it."""
    with cli_errors():
        config, flags = load_config(config_class(config_name), argv)
        if flags.dry_run:
            from megatext.training.estimate import dry_run

            dry_run(config, flags.deepspeed_config)
        else:
            from megatext.training.trainer import train

            train(config, build_recipe(config), flags.deepspeed_config)
