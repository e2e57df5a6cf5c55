"""The whole target at once, beside its clean context (TextLDM)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatext.generation.noise import Noise, Request
from megatext.generation.sampling import SamplingConfig
from megatext.nn.attention import make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout

if TYPE_CHECKING:
    from megatext.generation.text_generator import TextGenerator


def generate(
    generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig
) -> Iterator[list[list[int]]]:
    """Yields once: the whole target of every request."""
    network, device = generator.module.network, generator.module.network.latent_in.weight.device
    lengths = [(len(r.prompt), len(r.prompt) + r.target_tokens) for r in requests]
    columns = max(end for _, end in lengths)
    tokens = torch.zeros(len(requests), columns, dtype=torch.long)
    for row, request in enumerate(requests):
        tokens[row, : len(request.prompt)] = torch.tensor(request.prompt, dtype=torch.long)
    tokens = tokens.to(device)
    begin, end = torch.tensor(lengths, device=device).T[:, :, None]
    position = torch.arange(columns, device=device).expand(len(requests), columns)
    role = torch.where(position < begin, CONTEXT, TARGET)
    layout = Layout.of(torch.where(position < end, 0, PADDING), position, role)
    is_target = role == TARGET
    alone = Layout.of(torch.where(is_target & layout.real, 0, PADDING), position, role)
    context = generator.latents_of(tokens, Layout.of(torch.where(is_target, PADDING, 0), position))
    dropped = torch.zeros_like(context) if generator.flow.null_condition == "zeros" else context
    masks = {True: make_mask("full", layout, backend="dense"), False: make_mask("full", alone, backend="dense")}
    if generator.flow.null_condition == "zeros":
        masks[False] = masks[True]

    def one(z: Tensor, t: Tensor, previous: Tensor | None, conditional: bool) -> Tensor:
        z = torch.where(is_target[..., None], z, context if conditional else dropped)
        timesteps = torch.stack((torch.zeros_like(t), t))
        return network(
            z, timesteps, is_target.long(), position, is_target, masks[conditional], self_condition=previous
        )[0].float()

    def predict(z: Tensor, t: Tensor, previous: Tensor | None, guided: bool) -> tuple[Tensor, Tensor | None]:
        return one(z, t, previous, True), one(z, t, previous, False) if guided else None

    noise = Noise(requests, [0] * len(requests), lengths, device)
    final = generator.denoise(noise, sampling, predict)
    written = generator.tokens_of(final, alone, sampling)
    yield [written[row, first:last].tolist() for row, (first, last) in enumerate(lengths)]
