"""The learning rate as a pure function of the step."""

import math

from megatext.training.optimizer import OptimizerConfig


def learning_rate_share(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The share of the peak learning rate for the step that follows `step` completed ones, in [0, 1].

    Linear warm-up, then the peak, then the decay over the last `decay_steps` steps.
    """
    warmup = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warmup
    decay_steps = max(1, max_steps - config.warmup_steps if config.decay_steps is None else config.decay_steps)
    done = min(max((step - (max_steps - decay_steps)) / decay_steps, 0.0), 1.0)
    shape = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return warmup * (config.min_learning_rate_ratio + (1.0 - config.min_learning_rate_ratio) * shape)
