"""Block after block with a KV cache: history is committed as clean tokens (Cola DLM section on inference)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatext.generation.noise import Noise, Request
from megatext.generation.sampling import SamplingConfig
from megatext.nn.attention import KVCache, make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout

if TYPE_CHECKING:
    from megatext.generation.text_generator import TextGenerator


def generate(
    generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig
) -> Iterator[list[list[int]]]:
    """Yields, for every request, the next piece of its target: the tokens of one block."""
    writer = _Writer(generator, requests, sampling)
    writer.read_prompts()
    while writer.unfinished:
        yield writer.next_block()


class _Writer:
    """The state of a call: all tokens so far by position, and the cache of the whole blocks among them."""

    def __init__(self, generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig) -> None:
        self.generator, self.requests, self.sampling = generator, requests, sampling
        self.size = generator.flow.block_tokens
        trunk, weight = generator.module.network.config.trunk, generator.module.network.latent_in.weight
        self.device = weight.device
        self.known = torch.tensor([len(r.prompt) for r in requests], device=self.device)
        self.length = self.known + torch.tensor([r.target_tokens for r in requests], device=self.device)
        slots = -(-int(self.length.max()) // self.size) * self.size if requests else self.size
        self.tokens = torch.zeros(len(requests), slots, dtype=torch.long, device=self.device)
        for row, request in enumerate(requests):
            self.tokens[row, : len(request.prompt)] = torch.tensor(request.prompt, dtype=torch.long)
        self.cache = KVCache(
            trunk.layers,
            len(requests),
            trunk.heads,
            slots,
            trunk.width // trunk.heads,
            dtype=weight.dtype,
            device=self.device,
        )
        self.committed = torch.zeros_like(self.known)
        self.slots = torch.arange(slots, device=self.device).expand(len(requests), slots)

    @property
    def unfinished(self) -> bool:
        return bool((self.known < self.length).any())

    def read_prompts(self) -> None:
        """Commit the whole blocks of all prompts in one pass."""
        self._commit(self.slots, self.known // self.size * self.size)

    def next_block(self) -> list[list[int]]:
        """Denoise the block in which each row's text ends; rows that are complete are left out."""
        rows = (self.known < self.length).nonzero()[:, 0]
        start = self.known[rows] // self.size * self.size
        position = start[:, None] + torch.arange(self.size, device=self.device)
        given = position < self.known[rows, None]
        own = Layout.of(torch.zeros_like(position), position, torch.full_like(position, TARGET), self.size)
        written = self.tokens[rows].gather(1, position)
        clean = self._latents(rows, written, position)
        final = self._denoise(rows, start, own, given, clean)
        written = torch.where(given, written, self._decode(rows, final, own))
        self.tokens[rows] = self.tokens[rows].scatter(1, position, written)
        pieces: list[list[int]] = [[] for _ in self.requests]
        for row, begin in zip(rows.tolist(), start.tolist(), strict=True):
            end = min(begin + self.size, int(self.length[row]))
            pieces[row] = self.tokens[row, int(self.known[row]) : end].tolist()
            self.known[row] = end
        if self.unfinished:
            whole = torch.zeros_like(self.known)
            whole[rows] = start + self.size
            every = self.committed[:, None] + torch.arange(self.size, device=self.device)
            self._commit(every.clamp(max=self.tokens.shape[1] - 1), whole)
        return pieces

    def _denoise(self, rows: Tensor, start: Tensor, own: Layout, given: Tensor, clean: Tensor) -> Tensor:
        """Clean repaint: tokens of the block that the prompt gives stay at their latents and at t = 0."""
        network = self.generator.module.network
        history = self._history(rows)
        past = self.cache.of(rows)
        with_history = make_mask("two_stream", own, Layout.concatenate([history, own]), backend="dense")
        alone = make_mask("two_stream", own, backend="dense")
        index = (~given).long()
        left = self.tokens[rows].gather(1, (own.position - 1).clamp(min=0))
        first = own.position % self.size == 0

        def predict(z: Tensor, t: Tensor, previous: Tensor | None, conditional: bool) -> Tensor:
            z = torch.where(given[..., None], clean, z)
            clean_left = (own.position > 0) & torch.where(first, conditional, given.roll(1, dims=1))
            return network(
                z,
                torch.stack((torch.zeros_like(t), t)),
                index,
                own.position,
                torch.ones_like(given),
                with_history if conditional else alone,
                self_condition=previous,
                neighbours=torch.where(clean_left, left, -1),
                past=past if conditional else None,
            )[0].float()

        chosen = [self.requests[i] for i in rows.tolist()]
        noise = Noise(chosen, start.tolist(), [(0, self.size)] * len(chosen), self.device)
        return self.generator.denoise(
            noise,
            self.sampling,
            lambda z, t, previous: predict(z, t, previous, True),
            lambda z, t, previous: predict(z, t, previous, False),
        )

    def _history(self, rows: Tensor) -> Layout:
        """Layout of the cache's slots; slots not yet written belong to nobody."""
        slots = self.slots[rows]
        segment = torch.where(slots < self.committed[rows, None], 0, PADDING - 1)
        return Layout.of(segment, slots, torch.full_like(slots, CONTEXT), self.size)

    def _commit(self, position: Tensor, until: Tensor) -> None:
        """Write keys and values of the tokens at `position [rows, n]` that are below `until [rows]` and new."""
        keep = (position < until[:, None]) & (position >= self.committed[:, None])
        if not bool(keep.any()):
            return
        every = torch.arange(len(self.requests), device=self.device)
        segment = torch.where(keep, 0, PADDING)
        own = Layout.of(segment, position, torch.full_like(position, CONTEXT), self.size)
        mask = make_mask("two_stream", own, Layout.concatenate([self._history(every), own]), backend="dense")
        tokens = self.tokens.gather(1, position)
        latents = self._latents(every, tokens, position)
        index = torch.zeros_like(position)
        _, kept = self.generator.module.network(
            latents,
            torch.zeros(1, device=self.device),
            index,
            position,
            torch.zeros_like(keep),
            mask,
            tokens=tokens,
            past=self.cache.of(every),
            predict=False,
        )
        self.cache.write(kept, position, keep)
        self.committed = torch.maximum(self.committed, until)

    def _latents(self, rows: Tensor, tokens: Tensor, position: Tensor) -> Tensor:
        """Clean latents of `tokens` at `position`; a causal encoder needs the whole text before them."""
        if self.generator.vae.token_local:
            layout = Layout.of(torch.zeros_like(tokens), position)
            return self.generator.latents_of(tokens, layout)
        layout = Layout.of(torch.zeros_like(self.slots[rows]), self.slots[rows], block_tokens=self.size)
        latents = self.generator.latents_of(self.tokens[rows], layout)
        return latents.gather(1, position[..., None].expand(-1, -1, latents.shape[-1]))

    def _decode(self, rows: Tensor, final: Tensor, own: Layout) -> Tensor:
        """Tokens of the block; a VAE decodes it together with the latents of what stands before it."""
        if self.generator.module.table is not None:
            return self.generator.tokens_of(final, own, self.sampling)
        slots = self.slots[rows]
        latents = self._latents(rows, self.tokens[rows], slots)
        latents = latents.scatter(1, own.position[..., None].expand_as(final), final)
        end = own.position[:, -1:]
        layout = Layout.of(torch.where(slots <= end, 0, PADDING), slots, block_tokens=self.size)
        return self.generator.tokens_of(latents, layout, self.sampling).gather(1, own.position)
