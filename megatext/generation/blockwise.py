"""Block after block with KV caches (Cola DLM Eq. 2.2.4 to 2.2.6): encode the prompt, then denoise, decode and commit.

Committed are whole clean blocks: their keys and values in the denoiser, and, where the autoencoder looks back, in its
encoder and decoder. Those of a block in the denoiser come with the first pass over the next. Rows are aligned by
position, a slot a token, and a row that has its text takes no further part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatext.generation.noise import Noise, Request
from megatext.nn.attention import KeysValues, KVCache, Mask, make_mask
from megatext.nn.blocks import Trunk
from megatext.nn.layout import CONTEXT, PADDING, TARGET, AttentionRule, Layout
from megatext.nn.text_vae import TextVAE
from megatext.recipes.sampling import SamplingConfig

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
    """What the denoiser is given in a pass besides the noisy latents, for some rows. Its columns: the block before, if
    its keys and values are not in the cache yet; the block that is written; under guidance this once more, as if
    nothing stood before it. Tensors are `[rows, columns]`, `clean` `[rows, columns, channels]`, standardised."""

    position: Tensor
    given: Tensor
    clean: Tensor
    alone: Tensor
    neighbours: Tensor
    mask: Mask
    past: list[KeysValues] | None
    tokens: Tensor
    """Of the block before: as many as its columns, or none."""
    copies: int
    """Of the block that is written: 2 under guidance."""


@dataclass
class _Written:
    """A block of some rows whose keys and values the next pass of the denoiser works out beside its own: where a pass
    over the weights is what takes time, this saves one a block. Tensors are `[rows, size]`, `latents` `[rows, size,
    channels]`, standardised."""

    position: Tensor
    tokens: Tensor
    latents: Tensor


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
        # in the denoiser's cache; those of the autoencoder are ahead of it by the block that waits for the next pass
        self.committed = torch.zeros_like(self.known)
        self.waiting: _Written | None = None  # of the rows that are unfinished
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
            latents, real = self._commit_autoencoder(rows, position), torch.ones_like(position).bool()
            mask, past = self._after("two_stream", self.cache, rows, position, real, self.size)
            _, kept = self.network(
                latents,
                self.modulations,
                torch.zeros_like(position),
                position,
                ~real,
                mask,
                tokens=self.tokens[rows].gather(1, position),
                past=past,
                history=position.shape[1],
            )
            self._commit_denoiser(kept, rows, position)
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
            rows, position = rows[goes_on], position[goes_on]
            latents = self._commit_autoencoder(
                rows, position, final[goes_on] if self.sampling.history == "latents" else None
            )
            self.waiting = _Written(position, written[goes_on], latents)
        return pieces

    def _denoise(self, rows: Tensor, position: Tensor, given: Tensor, clean: Tensor) -> Tensor:
        """Clean repaint: tokens of the block that the prompt gives stay at their latents and at t = 0."""
        begun = self.waiting is not None or bool((self.committed[rows] > 0).any())
        views: dict[bool, _View] = {}

        def predict(z: Tensor, t: Tensor, previous: Tensor | None, guided: bool) -> tuple[Tensor, Tensor | None]:
            guided = guided and begun  # with nothing before a block both are the same
            view = views.get(guided) or self._view(rows, position, given, clean, guided)
            predicted = self._predict(view, z, t, previous, rows)
            if not view.tokens.numel():
                views[guided] = view
            return predicted[0], (predicted[1] if guided else None)

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

    def _predict(self, view: _View, z: Tensor, t: Tensor, previous: Tensor | None, rows: Tensor) -> tuple[Tensor, ...]:
        """Of every copy of the block, float32 `[rows, size, channels or vocab_size]`. Commits the block that waits."""
        waiting, given = view.tokens.shape[1], view.given[..., None]

        def beside(latents: Tensor) -> Tensor:
            return torch.where(
                given, view.clean, torch.cat((view.clean[:, :waiting], latents.repeat(1, view.copies, 1)), 1)
            )

        target = torch.ones_like(view.given)
        target[:, :waiting] = False
        predicted, kept = self.network(
            beside(z),
            self.modulations,
            (~view.given).long() * self.step_of[float(t)],
            view.position,
            target,
            view.mask,
            self_condition=None if previous is None else beside(previous),
            alone=view.alone,
            tokens=view.tokens,
            neighbours=view.neighbours,
            past=view.past,
            history=waiting,
        )
        if waiting:
            self._commit_denoiser(
                [(k[:, :, :waiting], v[:, :, :waiting]) for k, v in kept], rows, view.position[:, :waiting]
            )
            self.waiting = None
        return predicted.float().chunk(view.copies, dim=1)

    def _view(self, rows: Tensor, position: Tensor, given: Tensor, clean: Tensor, guided: bool) -> _View:
        everything, first = torch.ones_like(given), position % self.size == 0
        left = self.tokens[rows].gather(1, (position - 1).clamp(min=0))
        inside = given.roll(1, dims=1)  # the last is never given, so none is left of the first

        def told(clean_left: Tensor) -> Tensor:
            return torch.where((position > 0) & clean_left, left, -1)

        role = torch.full_like(position, TARGET)
        # the first block has nothing before it
        columns = [(position, role, given, clean, position < self.size, told(first | inside))]
        if guided:
            columns.append((position, role + 1, given, clean, everything, told(inside)))
        tokens = position[:, :0]
        if self.waiting is not None:
            block, tokens = self.waiting, self.waiting.tokens
            context, nobody = torch.full_like(tokens, CONTEXT), torch.full_like(tokens, -1)
            columns.insert(0, (block.position, context, everything, block.latents, ~everything, nobody))
        whole, roles, known, latents, alone, neighbours = (torch.cat(x, dim=1) for x in zip(*columns, strict=True))
        mask, past = self._after("two_stream", self.cache, rows, whole, torch.ones_like(known), self.size, roles)
        if guided:
            assert mask.dense is not None
            mask.dense[:, :, -self.size :, : -self.size] = False
        return _View(whole, known, latents, alone, neighbours, mask, past, tokens, 1 + guided)

    def _after(
        self,
        rule: AttentionRule,
        cache: KVCache,
        rows: Tensor,
        position: Tensor,
        real: Tensor,
        block_tokens: int,
        role: Tensor | None = None,
    ) -> tuple[Mask, list[KeysValues] | None]:
        """Who sees whom where the `real` tokens at `position` stand after what is committed, and that."""
        own = Layout.of(torch.where(real, 0, PADDING), position, role, block_tokens)
        until = int(self.committed[rows].max())
        if until == 0:
            return make_mask(rule, own, backend="dense"), None
        slots = torch.arange(until, device=self.device).expand(len(rows), -1)
        # slots not yet written belong to nobody
        segment = torch.where(slots < self.committed[rows, None], 0, PADDING - 1)
        earlier = Layout.of(segment, slots, block_tokens=block_tokens)
        return make_mask(rule, own, Layout.concatenate([earlier, own]), backend="dense"), cache.of(rows, until)

    def _commit_autoencoder(self, rows: Tensor, position: Tensor, latents: Tensor | None = None) -> Tensor:
        """Clean latents of the tokens at `position [rows, n]`, whole blocks, for the denoiser: `latents`, or those that
        their encoding gives. The autoencoder's caches take them in."""
        real = torch.ones_like(position).bool()
        if latents is None:
            latents = self._encode(rows, self.tokens[rows].gather(1, position), position, real, commit=True)
        if self.decoder_cache is not None:
            mask, past = self._vae_after(self.decoder_cache, rows, position, real)
            _, kept = self.vae.decode_after(self.vae.unstandardise(latents), position, mask, past)
            self.decoder_cache.write(kept, rows, position)
        return latents

    def _commit_denoiser(self, kept: list[KeysValues], rows: Tensor, position: Tensor) -> None:
        """The denoiser's keys and values of whole clean blocks: they are committed now."""
        self.cache.write(kept, rows, position)
        self.committed[rows] += position.shape[1]

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
            self.encoder_cache.write(kept, rows, position)
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
        earlier = self.generator.latents_of(self.tokens[rows], Layout.of(torch.zeros_like(slots), slots))
        whole = earlier.scatter(1, position[..., None].expand_as(latents), latents)
        layout = Layout.of(torch.where(slots <= position[:, -1:], 0, PADDING), slots)
        return self.vae.decode(self.vae.unstandardise(whole), layout, position)
