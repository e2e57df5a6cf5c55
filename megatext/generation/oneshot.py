"""The whole target at once, beside its clean context, wherever that stands (TextLDM, LDLM)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatext.generation.noise import Noise, Request
from megatext.nn.attention import KeysValues, Mask, make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout
from megatext.nn.text_vae import TextVAE
from megatext.recipes.sampling import SamplingConfig

if TYPE_CHECKING:
    from megatext.generation.text_generator import TextGenerator


def generate(
    generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig
) -> Iterator[list[list[int]]]:
    """Yields once: the whole target of every request."""
    writer = Writer(generator, requests, generator.grid(sampling))
    lengths = [request.target_tokens for request in requests]

    def cut(tokens: Tensor) -> list[list[int]]:
        return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]

    def observe(tokens: Tensor) -> None:
        if generator.observer is not None:
            generator.observer(cut(tokens))

    noise = Noise(requests, [0] * len(requests), [(0, length) for length in lengths], generator.device)
    final = generator.denoise(noise, sampling, writer.predict, writer.logits, writer.target.real, observe)
    yield cut(generator.tokens_of(final, writer.logits, sampling))


class Writer:
    """A call's contexts and targets: columns of context, then columns of target, each at its own position. The
    timesteps of a `grid` are embedded once."""

    def __init__(self, generator: "TextGenerator", requests: "list[Request]", grid: Tensor | None = None) -> None:
        self.generator, self.network, self.flow = generator, generator.module.network, generator.flow
        device, places = generator.device, [request.places() for request in requests]
        self.context = _layout([given for given, _ in places], CONTEXT, device)
        self.target = _layout([free for _, free in places], TARGET, device)
        tokens = torch.zeros_like(self.context.position)
        for row, request in enumerate(requests):
            tokens[row, : len(request.prompt)] = torch.tensor(request.prompt, dtype=torch.long)
        self.grid = torch.zeros(1, device=device) if grid is None else torch.cat((grid.new_zeros(1), grid))
        self.modulations = self.network.modulations(self.grid)
        self.step_of = {t: 1 + step for step, t in enumerate([] if grid is None else grid.tolist())}
        self.tokens, self.latents = tokens, generator.latents_of(tokens, self.context)
        has_context = self.context.real.any(dim=1, keepdim=True).expand(self.target.position.shape)
        self.alone = torch.cat((~has_context, torch.ones_like(has_context)))
        self._condition()

    def _condition(self) -> None:
        """Latents, masks and, where a context sees itself alone, keys and values: with the contexts, and after these
        the null condition."""
        zeros = self.flow.null_condition == "zeros"
        null = torch.zeros_like(self.latents) if zeros else self.latents
        self.contexts = torch.cat((self.latents, null))
        whole = Layout.concatenate([self.context, self.target])
        prefix = self.flow.attention == "prefix"
        mask = make_mask(self.flow.attention, self.target if prefix else whole, whole, backend="dense").dense
        assert mask is not None
        without = mask.clone()
        if not zeros:
            without[:, :, -self.target.position.shape[1] :, : self.context.position.shape[1]] = False
        self.masks = torch.cat((mask, without))
        self.past: list[KeysValues] | None = None
        if prefix:
            both = Layout(*(torch.cat((x, x)) for x in vars(self.context).values()))
            nothing = torch.zeros_like(both.position)
            _, self.past = self.network(
                self.contexts,
                self.modulations or self.grid[:1],
                nothing,
                both.position,
                nothing.bool(),
                make_mask("full", both, backend="dense"),
                history=both.position.shape[1],
            )

    def predict(self, z: Tensor, t: Tensor, previous: Tensor | None, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Of the noisy targets `[rows, columns, channels]`; where guided both passes are one, over twice the rows."""
        times, rows = (2 if guided else 1), len(z)
        z = z.repeat(times, 1, 1)
        previous = None if previous is None else previous.repeat(times, 1, 1)
        position, is_target = self.target.position.repeat(times, 1), torch.ones_like(self.target.real).repeat(times, 1)
        alone, past, n = self.alone[: times * rows], None, z.shape[1]
        if self.past is not None:
            past = [(keys[: times * rows], values[: times * rows]) for keys, values in self.past]
        else:
            contexts, before = self.contexts[: times * rows], self.context.position.repeat(times, 1)
            z, position = torch.cat((contexts, z), dim=1), torch.cat((before, position), dim=1)
            is_target = torch.cat((torch.zeros_like(before).bool(), is_target), dim=1)
            alone = torch.cat((torch.zeros_like(before).bool(), alone), dim=1)
            previous = None if previous is None else torch.cat((torch.zeros_like(contexts), previous), dim=1)
        step = self.step_of.get(float(t))
        predicted = self.network(
            z,
            torch.stack((torch.zeros_like(t), t)) if step is None or not self.modulations else self.modulations,
            is_target.long() * (step or 1),
            position,
            is_target,
            Mask(dense=self.masks[: times * rows]),
            self_condition=previous,
            alone=alone,
            past=past,
        )[0][:, -n:].float()
        return (predicted[:rows], predicted[rows:]) if guided else (predicted, None)

    def target_latents(self, tokens: Tensor) -> Tensor:
        """Standardised clean latents `[rows, columns, channels]` of the targets, were they `tokens [rows, columns]`."""
        vae = self.generator.vae
        if self.flow.target_encoding == "separate" and isinstance(vae, TextVAE):
            return self.generator.latents_of(tokens, self.target)
        both, whole = torch.cat((self.tokens, tokens), dim=1), Layout.concatenate([self.context, self.target])
        found = vae.encode(both, whole, rule="prefix") if isinstance(vae, TextVAE) else vae.encode(both, whole)
        return vae.standardise(found[0])[:, -tokens.shape[1] :]

    def logits(self, latents: Tensor) -> Tensor:
        """`[rows, columns, vocab_size]` of the targets' clean latents, decoded as they were encoded."""
        vae = self.generator.vae
        if self.flow.target_encoding == "separate":
            return vae.decode(vae.unstandardise(latents), self.target)
        both = torch.cat((self.latents, latents), dim=1)
        decoded = vae.decode(vae.unstandardise(both), Layout.concatenate([self.context, self.target]))
        return decoded[:, -latents.shape[1] :]


def _layout(places: list[list[int]], role: int, device: torch.device) -> Layout:
    """Tokens at some positions of each row, padded to the longest, and to one column at least."""
    columns = max(1, *map(len, places))
    position = torch.zeros(len(places), columns, dtype=torch.long)
    segment = torch.full_like(position, PADDING)
    for row, at in enumerate(places):
        position[row, : len(at)] = torch.tensor(at, dtype=torch.long)
        segment[row, : len(at)] = 0
    return Layout.of(segment.to(device), position.to(device), torch.full_like(position, role).to(device))
