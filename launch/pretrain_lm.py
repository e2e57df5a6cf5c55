"""Pretrain an autoregressive language model: deepspeed launch/pretrain_lm.py --config FILE [--section.key value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.config import cli_errors, load_config
from megatext.recipes import build_recipe


def main() -> None:
    """Read the configuration, build the recipe, train."""
    with cli_errors():
        from megatext.recipes.causal_lm import PretrainLMConfig
        from megatext.training.trainer import train

        config, flags = load_config(PretrainLMConfig, sys.argv[1:])
        train(config, build_recipe(config), flags.deepspeed_config, flags.dry_run)


if __name__ == "__main__":
    main()
