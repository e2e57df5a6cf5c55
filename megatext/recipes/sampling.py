"""How a text is sampled: one configuration for every system, in a model's description and saved with every output."""

from dataclasses import dataclass
from typing import Literal

from megatext.config import ConfigError
from megatext.flow.solvers import Solver
from megatext.recipes.flow_config import FlowConfig


@dataclass(frozen=True)
class SamplingConfig:
    """Solver, guidance and temperature."""

    steps: int = 16
    """Solver steps, of a block or of the whole target."""
    solver: Solver = "euler"
    """Of the ODE `euler`, `heun` (two network calls a step) and `dpmpp_2m` (DPM-Solver++, which remembers a step); of
    the SDE `dpmpp_2m_sde`. `ancestral` draws a token from every step's distribution and adds fresh noise to its latent:
    right in few steps where the ODE is not, for models that end in token logits."""
    grid: Literal["quantile", "uniform"] = "quantile"
    """Timesteps at the quantiles of the training distribution, or evenly spaced."""
    temperature: float = 1.0
    """Of the token distribution whose expected latent is x0; 0 takes the likeliest. Needs a model that ends in
    token logits."""
    guidance_scale: float = 1.0
    """1 is no guidance; above 1 every step in the interval costs as much again, in the same call."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps in which guidance acts."""
    exit_margin: float = 0.0
    """A text is as it is, and no further step taken, once every one of its tokens is decoded with a probability that
    leads the next one's by so much (the margin rule of arXiv 2606.08810); 0 takes all steps. Where latents are
    predicted it costs the decoder at every step."""
    block_tokens: int = 0
    """Tokens of a block, one of the sizes that the model was trained in; 0: its own. Smaller is better and slower."""
    history: Literal["tokens", "latents"] = "tokens"
    """What a written block is to the blocks after it: its tokens, encoded again, or the latents it was sampled as
    (Cola DLM's release; saves the encoder's pass)."""
    length: Literal["oracle", "eos", "sampled"] = "oracle"
    """`oracle` generates the number of tokens asked for, none of them an end of text; `eos` at most that many, cut at
    the first end of text, where writing stops; `sampled` is `eos` with a text's most tokens drawn from the lengths of
    training's texts, which a one-shot model needs: it writes for the room it is given."""

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for name, fits, what in (
            ("steps", self.steps >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("guidance_scale", self.guidance_scale >= 0, "at least 0"),
            ("guidance_interval", 0 <= low <= high <= 1, "two timesteps, from 0 to 1"),
            ("exit_margin", 0 <= self.exit_margin <= 1, "a difference of two probabilities, from 0 to 1"),
            ("block_tokens", self.block_tokens >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(f"sampling: {name} {getattr(self, name)}: has to be {what}")


def check_sampling(sampling: SamplingConfig, flow: FlowConfig, where: str = "") -> None:
    """Raise ConfigError, naming the field below `where`, where a model of this process cannot be sampled so."""
    by_tokens = flow.objective == "token_cross_entropy"
    if sampling.temperature != 1.0 and not by_tokens:
        raise ConfigError(f"{where}temperature needs a model that ends in token logits; set it to 1")
    if sampling.solver == "ancestral" and not by_tokens:
        raise ConfigError(f"{where}solver ancestral needs a model that ends in token logits; set it to euler")
    if sampling.history == "latents" and by_tokens:
        raise ConfigError(f"{where}history latents is for models that end in latents; set it to tokens")
    sizes = {flow.block_tokens, *flow.training_block_tokens}
    if sampling.block_tokens and (not flow.block_tokens or sampling.block_tokens not in sizes):
        trained = f"in blocks of {', '.join(map(str, sorted(sizes)))}" if flow.block_tokens else "in one shot"
        raise ConfigError(f"{where}block_tokens {sampling.block_tokens}: the model is trained {trained}")
