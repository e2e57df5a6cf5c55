"""Block after block with KV caches (Cola DLM Eq. 2.2.4 to 2.2.6): encode the prompt, then denoise, decode and commit.

Committed are whole clean blocks: their keys and values in the denoiser, and, where the autoencoder looks back, in its
encoder and decoder. Rows are aligned by position, a slot a token, and a row that has its text takes no further part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatext.generation.noise import Noise, Request
from megatext.generation.sampling import SamplingConfig
from megatext.nn.attention import KeysValues, KVCache, Mask, make_mask
from megatext.nn.blocks import Trunk
from megatext.nn.layout import CONTEXT, PADDING, TARGET, AttentionRule, Layout
from megatext.nn.text_vae import TextVAE

if TYPE_CHECKING:
    from megatext.generation.text_generator import TextGenerator

PREFILL_TOKENS = 256
"""Prompts are read in chunks of at most about as many tokens, which end where the shortest prompt ends: nothing is
computed for padding."""


def generate(
    generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig
) -> Iterator[list[list[int]]]:
    """Yields, for every request, the next piece of its target: the tokens of one block."""
    writer = _Writer(generator, requests, sampling)
    writer.read_prompts()
    while writer.unfinished:
        yield writer.next_block()


@dataclass
class _View:
    """What the denoiser is given at every step of a block besides the noisy latents, for some rows."""

    position: Tensor
    given: Tensor
    clean: Tensor
    alone: Tensor
    neighbours: Tensor
    mask: Mask
    past: list[KeysValues] | None


class _Writer:
    """The state of a call: all tokens so far by position, and the caches of the whole blocks among them."""

    def __init__(self, generator: "TextGenerator", requests: "list[Request]", sampling: SamplingConfig) -> None:
        self.generator, self.requests, self.sampling = generator, requests, sampling
        assert isinstance(generator.vae, TextVAE)  # others have no blocks
        self.network, self.vae, self.device = generator.module.network, generator.vae, generator.device
        self.size = sampling.block_tokens or generator.flow.block_tokens
        self.known = torch.tensor([len(r.prompt) for r in requests], device=self.device)
        self.length = self.known + torch.tensor([r.target_tokens for r in requests], device=self.device)
        self.slots = -(-max((len(r.prompt) + r.target_tokens for r in requests), default=1) // self.size) * self.size
        self.tokens = torch.zeros(len(requests), self.slots, dtype=torch.long, device=self.device)
        for row, request in enumerate(requests):
            self.tokens[row, : len(request.prompt)] = torch.tensor(request.prompt, dtype=torch.long)
        self.committed = torch.zeros_like(self.known)
        self.cache = self._cache(self.network.trunk, self.network.latent_in.weight.dtype)
        of_vae = self.vae.latent_in.weight.dtype
        self.encoder_cache = None if self.vae.token_local else self._cache(self.vae.encoder, of_vae)
        decodes = generator.module.table is None and self.vae.config.attention != "full"
        self.decoder_cache = self._cache(self.vae.decoder, of_vae) if decodes else None
        grid = generator.grid(sampling)
        self.modulations = self.network.modulations(torch.cat((grid.new_zeros(1), grid)))
        self.step_of = {t: 1 + step for step, t in enumerate(grid.tolist())}

    def _cache(self, trunk: Trunk, dtype: torch.dtype) -> KVCache:
        config, rows = trunk.config, len(self.requests)
        head = config.width // config.heads
        return KVCache(config.layers, rows, config.heads, self.slots, head, dtype=dtype, device=self.device)

    @property
    def unfinished(self) -> bool:
        return bool((self.known < self.length).any())

    def read_prompts(self) -> None:
        """Commit the whole blocks of all prompts."""
        whole = self.known // self.size * self.size
        chunk, start = max(1, PREFILL_TOKENS // self.size) * self.size, 0
        while len(rows := (whole > start).nonzero()[:, 0]):
            end = min(start + chunk, int(whole[rows].min()))
            position = torch.arange(start, end, device=self.device).expand(len(rows), -1)
            self._commit(rows, position, torch.ones_like(position, dtype=torch.bool))
            start = end

    def next_block(self) -> list[list[int]]:
        """Write the block in which each row's text ends; rows that are complete are left out."""
        rows = (self.known < self.length).nonzero()[:, 0]
        start = self.known[rows] // self.size * self.size
        position = start[:, None] + torch.arange(self.size, device=self.device)
        given = position < self.known[rows, None]
        tokens = self.tokens[rows].gather(1, position)
        # only where a prompt ends inside the block is there something to encode
        clean = torch.zeros(*position.shape, self.vae.config.latent_channels, device=self.device)
        if bool(given.any()):
            clean = self._encode(rows, tokens, position, given)
        final = self._denoise(rows, position, given, clean)
        written = torch.where(given, tokens, self._decode(rows, final, position))
        self.tokens[rows] = self.tokens[rows].scatter(1, position, written)
        if self.sampling.length != "oracle":
            end_ids = torch.tensor(self.generator.tokenizer.end_ids, device=self.device)
            ends = torch.isin(written, end_ids) & ~given & (position < self.length[rows, None])
            first = torch.where(ends.any(dim=1), start + ends.int().argmax(dim=1) + 1, self.length[rows])
            self.length[rows] = first
        pieces: list[list[int]] = [[] for _ in self.requests]
        for row, begin in zip(rows.tolist(), start.tolist(), strict=True):
            end = min(begin + self.size, int(self.length[row]))
            pieces[row] = self.tokens[row, int(self.known[row]) : end].tolist()
            self.known[row] = end
        goes_on = self.known[rows] < self.length[rows]
        if bool(goes_on.any()):
            latents = final[goes_on] if self.sampling.history == "latents" else None
            whole = torch.ones_like(given[goes_on])
            self._commit(rows[goes_on], position[goes_on], whole, latents)
        return pieces

    def _denoise(self, rows: Tensor, position: Tensor, given: Tensor, clean: Tensor) -> Tensor:
        """Clean repaint: tokens of the block that the prompt gives stay at their latents and at t = 0."""
        conditional = self._view(rows, position, given, clean, conditional=True)
        both: _View | None = None

        def predict(z: Tensor, t: Tensor, previous: Tensor | None, guided: bool) -> tuple[Tensor, Tensor | None]:
            nonlocal both
            if not guided or conditional.past is None:  # without history both are the same
                return self._predict(conditional, z, t, previous), None
            if both is None:
                both = _beside(conditional, self._view(rows, position, given, clean, conditional=False))
            # one pass over the weights, which at these few tokens are what takes time
            twice = None if previous is None else previous.repeat(2, 1, 1)
            with_history, without = self._predict(both, z.repeat(2, 1, 1), t, twice).chunk(2)
            return with_history, without

        chosen = [self.requests[i] for i in rows.tolist()]
        noise = Noise(chosen, position[:, 0].tolist(), [(0, self.size)] * len(chosen), self.device)

        def decode(final: Tensor) -> Tensor:
            return self._logits(rows, torch.where(given[..., None], clean, final), position)

        def observe(tokens: Tensor) -> None:
            """Of every text its part of this block, the end of it, which the prompt does not give."""
            if self.generator.observer is not None:
                known, ends = given.sum(dim=1).tolist(), (self.length[rows] - position[:, 0]).tolist()
                rows_of = zip(tokens.tolist(), known, ends, strict=True)
                self.generator.observer([row[first:end] for row, first, end in rows_of])

        counted = ~given & (position < self.length[rows, None])
        final = self.generator.denoise(noise, self.sampling, predict, decode, counted, observe)
        return final if final.ndim < 3 else torch.where(given[..., None], clean, final)

    def _predict(self, view: _View, z: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        given = view.given[..., None]
        return self.network(
            torch.where(given, view.clean, z),
            self.modulations,
            (~view.given).long() * self.step_of[float(t)],
            view.position,
            torch.ones_like(view.given),
            view.mask,
            self_condition=None if previous is None else torch.where(given, view.clean, previous),
            alone=view.alone,
            neighbours=view.neighbours,
            past=view.past,
        )[0].float()

    def _view(self, rows: Tensor, position: Tensor, given: Tensor, clean: Tensor, *, conditional: bool) -> _View:
        """With the history before a block, or as if there were none."""
        left = self.tokens[rows].gather(1, (position - 1).clamp(min=0))
        first = position % self.size == 0
        clean_left = (position > 0) & torch.where(first, conditional, given.roll(1, dims=1))
        everything = torch.ones_like(given)
        mask, past = self._after("two_stream", self.cache, rows, position, everything, self.size, TARGET)
        if not conditional and mask.dense is not None:
            mask.dense[..., : -self.size] = False
        alone = (position < self.size) if conditional else everything  # the first block has nothing before it
        return _View(position, given, clean, alone, torch.where(clean_left, left, -1), mask, past)

    def _after(
        self,
        rule: AttentionRule,
        cache: KVCache,
        rows: Tensor,
        position: Tensor,
        real: Tensor,
        block_tokens: int,
        role: int = CONTEXT,
    ) -> tuple[Mask, list[KeysValues] | None]:
        """Who sees whom where the `real` tokens at `position` stand after what is committed, and that."""
        own = Layout.of(torch.where(real, 0, PADDING), position, torch.full_like(position, role), block_tokens)
        until = int(self.committed[rows].max())
        if until == 0:
            return make_mask(rule, own, backend="dense"), None
        slots = torch.arange(until, device=self.device).expand(len(rows), -1)
        # slots not yet written belong to nobody
        segment = torch.where(slots < self.committed[rows, None], 0, PADDING - 1)
        before = Layout.of(segment, slots, block_tokens=block_tokens)
        return make_mask(rule, own, Layout.concatenate([before, own]), backend="dense"), cache.of(rows, until)

    def _commit(self, rows: Tensor, position: Tensor, keep: Tensor, latents: Tensor | None = None) -> None:
        """Write keys and values of the tokens at `position [rows, n]` where `keep`, whole blocks each; `latents`
        instead of those that their encoding gives."""
        tokens = self.tokens[rows].gather(1, position)
        if latents is None:
            latents = self._encode(rows, tokens, position, keep, commit=True)
        mask, past = self._after("two_stream", self.cache, rows, position, keep, self.size)
        _, kept = self.network(
            latents,
            self.modulations,
            torch.zeros_like(position),
            position,
            torch.zeros_like(keep),
            mask,
            tokens=tokens,
            past=past,
            predict=False,
        )
        self.cache.write(kept, rows, position, keep)
        if self.decoder_cache is not None:
            mask, past = self._vae_after(self.decoder_cache, rows, position, keep)
            _, kept = self.vae.decode_after(self.vae.unstandardise(latents), position, mask, past)
            self.decoder_cache.write(kept, rows, position, keep)
        self.committed[rows] += keep.sum(dim=1)

    def _vae_after(
        self, cache: KVCache, rows: Tensor, position: Tensor, real: Tensor
    ) -> tuple[Mask, list[KeysValues] | None]:
        config = self.vae.config
        return self._after(config.attention, cache, rows, position, real, config.block_tokens)

    def _encode(self, rows: Tensor, tokens: Tensor, position: Tensor, real: Tensor, commit: bool = False) -> Tensor:
        """Standardised clean latents of the `real` ones among `tokens`, which stand after what is committed."""
        if self.encoder_cache is None:
            return self.generator.latents_of(tokens, Layout.of(torch.where(real, 0, PADDING), position))
        mask, past = self._vae_after(self.encoder_cache, rows, position, real)
        mean, _, _, kept = self.vae.encode_after(tokens, position, mask, past)
        if commit:
            self.encoder_cache.write(kept, rows, position, real)
        return self.vae.standardise(mean)

    def _decode(self, rows: Tensor, final: Tensor, position: Tensor) -> Tensor:
        """Tokens of the block."""
        return self.generator.tokens_of(final, lambda latents: self._logits(rows, latents, position), self.sampling)

    def _logits(self, rows: Tensor, latents: Tensor, position: Tensor) -> Tensor:
        """Of the block's clean latents. A decoder that looks ahead too reads them with those of what stands before."""
        if self.decoder_cache is not None:
            mask, past = self._vae_after(self.decoder_cache, rows, position, torch.ones_like(position).bool())
            hidden, _ = self.vae.decode_after(self.vae.unstandardise(latents), position, mask, past)
            return self.vae.unembedding(hidden)
        slots = torch.arange(self.slots, device=self.device).expand(len(rows), -1)
        before = self.generator.latents_of(self.tokens[rows], Layout.of(torch.zeros_like(slots), slots))
        whole = before.scatter(1, position[..., None].expand_as(latents), latents)
        layout = Layout.of(torch.where(slots <= position[:, -1:], 0, PADDING), slots)
        return self.vae.decode(self.vae.unstandardise(whole), layout, position)


def _beside(a: _View, b: _View) -> _View:
    """Two views of the same columns as one of twice as many rows."""
    assert a.mask.dense is not None and b.mask.dense is not None and a.past is not None and b.past is not None
    past = [(torch.cat((k, k2)), torch.cat((v, v2))) for (k, v), (k2, v2) in zip(a.past, b.past, strict=True)]
    return _View(
        torch.cat((a.position, b.position)),
        torch.cat((a.given, b.given)),
        torch.cat((a.clean, b.clean)),
        torch.cat((a.alone, b.alone)),
        torch.cat((a.neighbours, b.neighbours)),
        Mask(dense=torch.cat((a.mask.dense, b.mask.dense))),
        past,
    )
