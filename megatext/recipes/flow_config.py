"""What a process of noise and its losses are: the options that all diffusion systems share."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megatext.config import ConfigError
from megatext.flow.timesteps import AdaptiveTimestepConfig, TimestepConfig


@dataclass(frozen=True)
class ConsistencyConfig:
    """Self-trajectory consistency, for few sampling steps (AURORA-LM, arXiv 2608.02602; consistency models, arXiv
    2303.01469): x0 as estimated at t has to be what is estimated one Euler step nearer to the data. The goal comes from
    the present weights, without gradient (arXiv 2310.14189), and costs a forward pass more."""

    weight: float = 0.0
    """Of the squared error between the two; 0: off."""
    steps: int = 16
    """The step is that of an inference grid of so many steps, at the quantiles of the timesteps."""
    warmup_steps: int = 0
    """Linear warm-up of the weight."""


@dataclass(frozen=True)
class FlowConfig:
    """The process: how latents become noise, what the network predicts, which timesteps it trains on."""

    path: str = "linear"
    """`linear` interpolation (TextLDM, Cola), or the tangent schedule `tan-D` (LDLM: tan-3)."""
    objective: Literal["velocity", "x0", "token_cross_entropy"] = "velocity"
    """What the network predicts, and its own loss. `velocity`, `x0`: the squared error. `token_cross_entropy`: logits
    whose expected latent is x0 (score interpolation, CDCD arXiv 2211.15089)."""
    latent_loss: Literal["own", "velocity", "x0"] = "own"
    """Where the squared error of latents is taken: of what is predicted, or converted to velocity or x0."""
    latent_weight: float | None = None
    """Of the squared error of latents; with token_cross_entropy it is that of the expected latents. null: 1 where it is
    the objective's own loss, else 0."""
    token_weight: float | None = None
    """Of the tokens' cross-entropy; where latents are predicted it goes through the frozen decoder. null: 1 where it is
    the objective's own loss, else 0."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    """A further loss, for sampling in few steps."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """Distribution of training timesteps; the quantile inference grid follows it."""
    adaptive_timesteps: AdaptiveTimestepConfig = field(default_factory=AdaptiveTimestepConfig)
    """With bins > 0 the distribution is found in training, and `timesteps` is where validation looks. One shot only."""
    token_likelihood: bool = False
    """Add the log-likelihood of each token's noisy latent to the logits (Bayes with the network as prior). Exact for
    latents that are posterior means, as those of blocks; of one shot's, which are samples, it leaves the posterior's
    variance out."""
    block_tokens: int = 0
    """Tokens of a block; 0 generates the whole target in one shot."""
    training_block_tokens: tuple[int, ...] = ()
    """Sizes of which every segment draws one in training (one named twice is drawn twice as often); empty: always
    block_tokens. Any of them can be asked for in generation."""
    timestep_per: Literal["block", "segment"] = "block"
    """What has a timestep of its own (two-stream training only; one shot: a segment)."""
    posterior: Literal["mean", "sample"] = "mean"
    """What the latents of two-stream training are: means of the VAE's posterior, or samples."""
    noise_copies: int = 1
    """Noisy copies of a row that share one clean copy (two-stream training only)."""
    partial_block_probability: float = 0.05
    """Share of blocks whose first tokens, at least one and not all, are given clean, as where a prompt ends."""
    self_conditioning_probability: float = 0.0
    """Share of steps in which a first pass provides the self-condition."""
    condition_dropout: float = 0.1
    """Share of segments that are generated without context, for classifier-free guidance."""
    null_condition: Literal["zeros", "drop"] = "drop"
    """A dropped context is zero vectors (TextLDM; one shot only) or not there at all (Cola's empty prefix)."""
    unconditional_probability: float = 0.1
    """Share of segments that are all target (one shot only; blocks start from nothing by themselves)."""
    context_fraction: tuple[float, float] = (0.1, 0.9)
    """Range of the context's share of a segment (one shot only)."""
    infill_probability: float = 0.0
    """Share of segments whose target is not their end but lies anywhere in them (one shot only): for `infill`."""
    attention: Literal["full", "prefix"] = "full"
    """Whether a context sees its target (TextLDM), or itself alone, so that generation computes it once and keeps its
    keys and values over all steps (one shot only)."""
    target_encoding: Literal["separate", "with_context"] = "separate"
    """Whether a target's latents are encoded, and decoded, as if there were no context (TextLDM), or with it in view
    (one shot, with a VAE whose rule is full)."""
    segment_lengths: Literal["windows", "uniform", "log_uniform"] = "windows"
    """Windows are segments as they are, or are cut into segments of random lengths from min_segment_tokens to a whole
    row. TextLDM samples lengths uniformly; short texts are rare then, unless they are log-uniform."""
    min_segment_tokens: int = 8
    """The shortest that is drawn; the ends of a window may be shorter."""
    eos_padding_tokens: int = 0
    """Up to so many ends of text after a segment, in its target, so that the model learns to end within a given room
    (`length: eos`). Needs data.packed: false and rows longer than windows."""

    def __post_init__(self) -> None:
        low, high = self.context_fraction
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"flow.context_fraction {[low, high]}: has to be two shares of a segment, from 0 to 1")
        for name in (
            "partial_block_probability", "self_conditioning_probability", "condition_dropout",
            "unconditional_probability", "infill_probability",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"flow.{name} {getattr(self, name)}: has to be a share, from 0 to 1")
        least = {"block_tokens": 0, "noise_copies": 1, "min_segment_tokens": 1, "eos_padding_tokens": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"flow.{name} {getattr(self, name)}: has to be at least {bound}")
        if self.consistency.steps < 2 or self.consistency.weight < 0 or self.consistency.warmup_steps < 0:
            raise ConfigError("flow.consistency: steps must be at least 2, weight and warmup_steps at least 0")
        if min(self._weights) < 0:
            raise ConfigError("flow.latent_weight and flow.token_weight must be at least 0")
        if self.own_weight + self.other_weight <= 0:
            raise ConfigError("flow.latent_weight and flow.token_weight are both 0: nothing would be learnt")
        if self.latent_loss != "own" and self._weights[0] == 0:
            raise ConfigError("flow.latent_loss: there is no error of latents; set flow.latent_weight, or leave it out")

    @property
    def _weights(self) -> tuple[float, float]:
        """Of the squared error of latents, and of the tokens' cross-entropy."""
        by_tokens = self.objective == "token_cross_entropy"
        latent = float(not by_tokens) if self.latent_weight is None else self.latent_weight
        return latent, float(by_tokens) if self.token_weight is None else self.token_weight

    @property
    def own_weight(self) -> float:
        """Of the objective's own loss."""
        return self._weights[self.objective == "token_cross_entropy"]

    @property
    def other_weight(self) -> float:
        """Of the tokens' cross-entropy where latents are predicted, of the latents' squared error where tokens are."""
        return self._weights[self.objective != "token_cross_entropy"]

    @property
    def other_loss(self) -> str:
        """The name of that loss."""
        return "flow_latent" if self.objective == "token_cross_entropy" else "flow_tokens"

    @property
    def latent_space(self) -> Literal["velocity", "x0"]:
        """Where the squared error of latents is taken."""
        if self.latent_loss != "own":
            return self.latent_loss
        return "velocity" if self.objective == "velocity" else "x0"

    def loss_weights(self, step: int) -> dict[str, float]:
        """Of the denoiser's losses at a step."""
        weights = {"flow": self.own_weight}
        weights |= {self.other_loss: self.other_weight} if self.other_weight > 0 else {}
        if self.consistency.weight > 0:
            warm = min(1.0, (step + 1) / self.consistency.warmup_steps) if self.consistency.warmup_steps else 1.0
            weights["consistency"] = warm * self.consistency.weight
        return weights

    def loss_counts(self, count: Tensor) -> dict[str, Tensor]:
        """The number of tokens that each of these losses is over."""
        return dict.fromkeys(self.loss_weights(0), count)
