"""How likely a text is after a prompt: bounds from a denoiser and its decoder, one shot or block after block."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatext import rng
from megatext.config import ConfigError
from megatext.flow.likelihood import diffusion_nats, ode_log_density, times_in_strata
from megatext.generation import oneshot
from megatext.generation.noise import Noise, Request
from megatext.nn.attention import make_mask
from megatext.nn.layout import PADDING, TARGET, Layout
from megatext.nn.text_vae import TextVAE

if TYPE_CHECKING:
    from megatext.generation.text_generator import TextGenerator


@dataclass(frozen=True)
class LikelihoodConfig:
    """How a bound on the likelihood is estimated."""

    estimator: Literal["variational", "ode"] = "variational"
    """`variational`: of the generative SDE, without bias. `ode`: the density of the probability-flow ODE, whose steps
    and whose estimate of the divergence add errors of either sign."""
    seeds: int = 8
    """Estimates that are averaged; their spread is the error."""
    first_seed: int = 0
    """Of these."""
    steps: int = 32
    """Calls of the network in an estimate (twice as many by the ODE)."""
    smallest_timestep: float = 0.1
    """Where the decoder takes over. Any gives a bound; which is tightest depends on the model."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest_timestep < 1 or self.seeds < 1 or self.steps < 1:
            raise ConfigError("likelihood: smallest_timestep must lie between 0 and 1, seeds and steps be at least 1")


@dataclass(frozen=True)
class Likelihood:
    """Of one text after its prompt, of the number of tokens that it has."""

    nats: float
    """An upper bound on -log p(text | prompt): mean of the estimates."""
    error: float
    """Standard error of that mean; nan of a single estimate."""
    estimates: tuple[float, ...]
    """One a seed. Texts share its noise, so that the errors of several texts do not average out."""
    decoder_nats: float
    """The decoder's part of it."""
    tokens: int
    """Tokens of the text."""
    estimator: str
    """How it was estimated."""


@dataclass
class _Rows:
    """Texts as the network sees them."""

    tokens: Tensor
    """int64 `[rows, columns]`."""
    scored: Tensor
    """bool `[rows, columns]`: the texts."""
    x0: Tensor
    """Their clean latents `[rows, columns, channels]`."""
    predict: Callable[[Tensor, Tensor], Tensor]
    """(z, t) -> what the network says."""
    decode: Callable[[Tensor], Tensor]
    """Clean latents -> logits."""
    noise: Callable[[int], Noise]
    """Of a seed."""


def log_likelihood(
    generator: "TextGenerator", pairs: list[tuple[list[int], list[int]]], config: LikelihoodConfig
) -> list[Likelihood]:
    """Of token ids (prompt, text), texts not empty. Raises ConfigError where the model has none."""
    s = config.smallest_timestep
    rows = (_blocks if generator.flow.block_tokens else _one_shot)(generator, pairs)
    path, scored, channels = generator.module.path, rows.scored[..., None], rows.x0.shape[-1]
    # even in log t: the signal-to-noise ratio changes fastest where there is little noise
    edges = torch.logspace(math.log10(s), 0, config.steps + 1, dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        z = torch.where(scored, z, rows.x0)
        x0 = generator.module.x0(z, t.to(z.dtype).expand(z.shape[:2]), rows.predict(z, t.to(z.dtype)))
        return torch.where(scored, x0, rows.x0)

    def estimate(seed: int) -> tuple[Tensor, Tensor]:
        """Nats of the decoder, and of the latents."""
        noise = rows.noise(seed)
        fresh, start = noise.normal(channels), edges[0].to(rows.x0)
        z = path.interpolate(rows.x0, fresh, start)
        decoded = _decoder_nats(generator, rows, z, start)
        if config.estimator == "variational":
            u = torch.from_numpy(rng.uniform(seed, "likelihood", range(config.steps)))
            times, weights = times_in_strata(path, edges, u)
            nats = diffusion_nats(path, denoise, rows.x0, times, weights, lambda: noise.normal(channels))
            return decoded, (nats * rows.scored).sum(dim=1)
        probe = torch.where(noise.normal(channels) > 0, 1.0, -1.0)
        log_p = ode_log_density(path, denoise, z, edges.to(rows.x0), probe, rows.scored)
        log_q = -0.5 * fresh.double().square() - math.log(float(path.sigma(edges[0])) * math.sqrt(2 * math.pi))
        return decoded, (log_q * scored).flatten(1).sum(dim=1) - log_p

    parts = [estimate(seed) for seed in range(config.first_seed, config.first_seed + config.seeds)]
    decoded = torch.stack([part for part, _ in parts])
    estimates = decoded + torch.stack([latent for _, latent in parts])
    error = estimates.std(dim=0) / math.sqrt(config.seeds)
    name = {"variational": "variational bound", "ode": "bound by the probability-flow ODE"}[config.estimator]
    means, by_decoder, tokens = estimates.mean(dim=0), decoded.mean(dim=0), rows.scored.sum(dim=1)
    return [
        Likelihood(
            float(means[i]),
            float(error[i]),
            tuple(estimates[:, i].tolist()),
            float(by_decoder[i]),
            int(tokens[i]),
            name,
        )
        for i in range(len(pairs))
    ]


def _decoder_nats(generator: "TextGenerator", rows: _Rows, z: Tensor, t: Tensor) -> Tensor:
    """-log p(text | z_t), float64 `[rows]`."""
    z = torch.where(rows.scored[..., None], z, rows.x0)
    every = t.expand(z.shape[:2])
    predicted = rows.predict(z, t)
    if generator.module.table is not None:
        logits = generator.module.logits(predicted, z, every)
    else:
        x0 = generator.module.x0(z, every, predicted)
        logits = rows.decode(torch.where(rows.scored[..., None], x0, rows.x0))
    nats = F.cross_entropy(logits.float().flatten(0, 1), rows.tokens.flatten(), reduction="none").double()
    return (nats.view(rows.tokens.shape) * rows.scored).sum(dim=1)


def _one_shot(generator: "TextGenerator", pairs: list[tuple[list[int], list[int]]]) -> _Rows:
    requests = [Request(prompt, len(text), 0) for prompt, text in pairs]
    writer = oneshot.Writer(generator, requests)
    tokens = torch.zeros_like(writer.target.position)
    for row, (_, text) in enumerate(pairs):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.long)
    spans = [(0, len(text)) for _, text in pairs]
    return _Rows(
        tokens=tokens,
        scored=writer.target.real,
        x0=writer.target_latents(tokens),
        predict=lambda z, t: writer.predict(z, t, None, False)[0],
        decode=writer.logits,
        noise=lambda seed: Noise(
            [Request(r.prompt, r.target_tokens, seed) for r in requests], [0] * len(requests), spans, generator.device
        ),
    )


def _blocks(generator: "TextGenerator", pairs: list[tuple[list[int], list[int]]]) -> _Rows:
    """All blocks of a text at once, each after the clean ones before it, as in two-stream training."""
    vae, network, size = generator.vae, generator.module.network, generator.flow.block_tokens
    assert isinstance(vae, TextVAE)
    if generator.module.table is None and vae.config.attention == "full" and vae.config.decoder.layers:
        raise ConfigError("likelihood: in blocks it needs a decoder that does not look ahead, or a model of tokens")
    unit = vae.config.block_tokens if vae.config.attention == "block_causal" else 1
    if any(len(prompt) % unit for prompt, _ in pairs):
        raise ConfigError(f"likelihood: a prompt has to end where a block of the VAE does, of {unit} tokens")
    device, columns = generator.device, max(len(prompt) + len(text) for prompt, text in pairs)
    tokens = torch.zeros(len(pairs), columns, dtype=torch.long)
    for row, (prompt, text) in enumerate(pairs):
        tokens[row, : len(prompt) + len(text)] = torch.tensor([*prompt, *text], dtype=torch.long)
    tokens = tokens.to(device)
    begin, end = torch.tensor([(len(p), len(p) + len(t)) for p, t in pairs], device=device).T[:, :, None]
    position = torch.arange(columns, device=device).expand(len(pairs), -1)
    segment = torch.where(position < end, 0, PADDING)
    clean = Layout.of(segment, position, block_tokens=size)
    noisy = clean.with_role(TARGET)
    scored = (position >= begin) & (position < end)
    x0 = generator.latents_of(tokens, vae.layout(segment, position))
    left = tokens.roll(1, dims=1)
    first, given = position % size == 0, ~scored
    neighbours = torch.where((position > 0) & torch.where(first, True, given.roll(1, dims=1)), left, -1)
    mask = make_mask("two_stream", noisy, Layout.concatenate([clean, noisy]), backend="dense")
    nothing = torch.zeros_like(position)
    _, past = network(
        x0,
        torch.zeros(1, device=device),
        nothing,
        position,
        nothing.bool(),
        make_mask("two_stream", clean, backend="dense"),
        tokens=tokens,
        history=columns,
    )

    def predict(z: Tensor, t: Tensor) -> Tensor:
        times = torch.stack((torch.zeros_like(t), t)).float()
        target, alone = torch.ones_like(scored), position < size
        return network(z, times, scored.long(), position, target, mask, alone=alone, neighbours=neighbours, past=past)[
            0
        ].float()

    spans = [(len(prompt), len(prompt) + len(text)) for prompt, text in pairs]
    return _Rows(
        tokens=tokens,
        scored=scored,
        x0=x0,
        predict=predict,
        decode=lambda latents: vae.decode(vae.unstandardise(latents), vae.layout(segment, position)),
        noise=lambda seed: Noise([Request(p, len(t), seed) for p, t in pairs], [0] * len(pairs), spans, device),
    )
