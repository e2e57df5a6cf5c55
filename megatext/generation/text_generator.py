"""Prompts in, text out: one door for every system."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatext.config import ConfigError, from_dict
from megatext.flow import guidance, objectives
from megatext.flow.paths import path_from_name
from megatext.flow.solvers import sample
from megatext.generation.lengths import draw_target_tokens, read_lengths
from megatext.generation.likelihood import Likelihood, LikelihoodConfig, log_likelihood
from megatext.generation.noise import Noise, Request, draw_tokens
from megatext.nn.layout import Layout
from megatext.nn.packed import pack_linears
from megatext.nn.text_vae import TextVAE
from megatext.recipes import cola_format
from megatext.recipes.denoiser import TextDiTTraining, make_denoiser
from megatext.recipes.hidden_autoencoder import HiddenAutoencoder, is_hidden_autoencoder, load_hidden_autoencoder
from megatext.recipes.pretrained import check_vocabulary, load_text_vae, read_description, weights_hash
from megatext.recipes.sampling import SamplingConfig, check_sampling
from megatext.recipes.text_dit import TextDiTRecipeConfig
from megatext.tokenizer import Tokenizer, load_tokenizer

Predictor = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]
"""(z, t, self-condition, guided) -> the network's prediction and, where guided and it differs, that without context."""

Autoencoder = TextVAE | HiddenAutoencoder
"""What latents are decoded by: TextLDM's and Cola DLM's, or LDLM's."""


class TextGenerator:
    """Generates with a denoiser and its VAE. A prompt's text is a function of (prompt, length, seed, sampling): it
    does not depend on the other prompts of the call."""

    def __init__(
        self, module: TextDiTTraining, vae: Autoencoder, tokenizer: Tokenizer, sampling: SamplingConfig
    ) -> None:
        """`sampling`: of calls that do not say."""
        self.module, self.vae, self.tokenizer, self.sampling = module, vae, tokenizer, sampling
        self.flow = module.flow
        self.window_tokens: list[int] = []
        self.observer: Callable[[list[list[int]]], None] | None = None
        """Is told the tokens of what is being denoised, of each text in work, after every step."""

    @staticmethod
    def from_pretrained(
        directory: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "TextGenerator":
        """Load an exported model, or a release in Cola DLM's format. Raises ConfigError if the directory is neither, or
        its VAE is another."""
        if cola_format.is_cola_directory(directory):
            text_vae, network, flow = cola_format.read(directory)
            check_vocabulary(text_vae, load_tokenizer(directory), directory)
            module = TextDiTTraining(network, flow, path_from_name(flow.path), None)
            return TextGenerator._on(module, text_vae, load_tokenizer(directory), SamplingConfig(), device, dtype)
        description = read_description(directory, "text_dit")
        config = from_dict(TextDiTRecipeConfig, description["config"], where=f"{directory}/config.json")
        vae_directory = Path(directory) / "vae"
        if weights_hash(vae_directory) != description["vae_hash"]:
            raise ConfigError(f"{vae_directory} is not the VAE this model was trained on; export the model again")
        vae: Autoencoder
        if is_hidden_autoencoder(vae_directory):
            vae, _ = load_hidden_autoencoder(vae_directory)
        else:
            vae, _ = load_text_vae(vae_directory)
        of_tokens = vae if isinstance(vae, TextVAE) else vae.network
        module = make_denoiser(config.network, config.flow, of_tokens, frozen=True)
        weights = load_file(Path(directory) / "model.safetensors")
        if config.network.token_embedding:
            weights["head.weight"] = weights["token_embedding.weight"]
        module.network.load_state_dict(weights)
        generator = TextGenerator._on(module, vae, load_tokenizer(directory), config.sampling, device, dtype)
        generator.window_tokens = read_lengths(Path(directory))
        return generator

    @staticmethod
    def _on(
        module: TextDiTTraining,
        vae: Autoencoder,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        device: str,
        dtype: torch.dtype,
    ) -> "TextGenerator":
        module.network.to(device=device, dtype=dtype).eval().requires_grad_(False)
        if module.table is not None:
            module.table = module.table.to(device)
        for part in (module.network, vae.to(device)):
            pack_linears(part)
        return TextGenerator(module, vae, tokenizer, sampling)

    def generate(
        self, prompts: list[str], *, target_tokens: list[int], seeds: list[int], sampling: SamplingConfig | None = None
    ) -> list[str]:
        """The continuation of each prompt ("" for a passage from nothing), `target_tokens[i]` tokens long, or at most,
        by `sampling.length`. Without a `sampling` the model's own.

        Raises ValueError where the lists differ in length, ConfigError where the sampling does not fit the model."""
        if not len(prompts) == len(target_tokens) == len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts, {len(target_tokens)} lengths, {len(seeds)} seeds: give one of each"
            )
        sampling = sampling or self.sampling
        requests = [self._request(p, n, s, sampling) for p, n, s in zip(prompts, target_tokens, seeds, strict=True)]
        texts = [[] for _ in requests]  # type: list[list[int]]
        for pieces in self._pieces(requests, sampling):
            for text, piece in zip(texts, pieces, strict=True):
                text.extend(piece)
        return [self.tokenizer.decode(self._cut(text, sampling)) for text in texts]

    def infill(
        self, texts: list[list[str | int]], *, seeds: list[int], sampling: SamplingConfig | None = None
    ) -> list[str]:
        """Texts with gaps, whole: of each its pieces, a string given and a number of tokens to write, in any order
        (`["Once upon a time", 12, " and that was the end."]`). A piece is tokenised by itself and may not be empty; no
        gap holds an end of text.

        Raises ConfigError where the model writes in blocks, which see only what stands before them, or was trained
        without `flow.infill_probability`."""
        if self.flow.block_tokens:
            raise ConfigError("infill is for one-shot models: a block sees only what stands before it")
        if not self.flow.infill_probability:
            raise ConfigError(
                "infill is for models trained with flow.infill_probability above 0; this one only learnt to write ends"
            )
        sampling = replace(sampling or self.sampling, length="oracle")
        requests = [self._with_gaps(pieces, seed) for pieces, seed in zip(texts, seeds, strict=True)]
        (written,) = self._pieces(requests, sampling)
        whole = []
        for request, tokens in zip(requests, written, strict=True):
            given, free = request.places()
            placed = sorted([*zip(given, request.prompt, strict=True), *zip(free, tokens, strict=True)])
            whole.append(self.tokenizer.decode([token for _, token in placed]))
        return whole

    def _with_gaps(self, pieces: list[str | int], seed: int) -> Request:
        prompt: list[int] = []
        given_at: list[int] = []
        place = 0
        for piece in pieces:
            tokens = self.tokenizer.encode(piece) if isinstance(piece, str) else [None] * piece
            if not tokens:
                raise ConfigError(f"infill: {piece!r} is an empty piece; leave it out")
            for token in tokens:
                if token is not None:
                    prompt.append(token)
                    given_at.append(place)
                place += 1
        if len(prompt) == place:
            raise ConfigError("infill: a text without a gap; a number among its pieces is one")
        return Request(prompt, place - len(prompt), seed, tuple(given_at))

    def log_likelihood(
        self, prompts: list[str], texts: list[str], config: LikelihoodConfig | None = None
    ) -> list[Likelihood]:
        """How likely each text is after its prompt (""), given how many tokens it has: bounds with their errors. All
        texts are scored at once.

        Raises ConfigError where a text is empty or the model has no such bound."""
        pairs = [(self.tokenizer.encode(p), self.tokenizer.encode(t)) for p, t in zip(prompts, texts, strict=True)]
        for number, (_, ids) in enumerate(pairs):
            if not ids:
                raise ConfigError(f"log_likelihood: text {number} has no tokens")
        self._check_prompts([prompt for prompt, _ in pairs])
        if not pairs:
            return []
        with torch.no_grad(), self._evaluating():
            return log_likelihood(self, pairs, config or LikelihoodConfig())

    def trace(
        self, prompt: str, *, target_tokens: int = 64, seed: int = 0, sampling: SamplingConfig | None = None
    ) -> list[str]:
        """What the continuation of a prompt reads like after every step (TextLDM's Table 7); with a model that writes
        in blocks each is the text so far."""
        sampling = sampling or self.sampling
        request = self._request(prompt, target_tokens, seed, sampling)
        written: list[int] = []
        shown: list[str] = []
        self.observer = lambda rows: shown.append(self.tokenizer.decode(self._cut([*written, *rows[0]], sampling)))
        try:
            for (piece,) in self._pieces([request], sampling):
                written.extend(piece)
        finally:
            self.observer = None
        return shown

    def preview(self, seed: int) -> list[str]:
        """A few short passages from nothing, as a training run shows them: of a length that is the same on all ranks,
        in as many passes, whatever is written."""
        sampling = replace(self.sampling, length="oracle", exit_margin=0.0)
        return self.generate([""] * 4, target_tokens=[32] * 4, seeds=[seed + i for i in range(4)], sampling=sampling)

    def stream(
        self, prompt: str, *, target_tokens: int = 256, seed: int = 0, sampling: SamplingConfig | None = None
    ) -> Iterator[str]:
        """The continuation of one prompt, block by block as it is written (all at once for a one-shot model). Without a
        `sampling` it ends with the text, or after `target_tokens`."""
        sampling = sampling or replace(self.sampling, length="eos")
        request = self._request(prompt, target_tokens, seed, sampling)
        tokens: list[int] = []
        shown = 0
        for (piece,) in self._pieces([request], sampling):
            tokens.extend(piece)
            cut = self._cut(tokens, sampling)
            ended = len(cut) < len(tokens) or len(tokens) >= request.target_tokens
            text = self.tokenizer.decode(cut)
            if not ended:
                text = text.rstrip("\ufffd")  # the first bytes of a character whose last ones are still to come
            yield text[shown:]
            shown = len(text)
            if ended:
                return

    def _request(self, prompt: str, target_tokens: int, seed: int, sampling: SamplingConfig) -> Request:
        ids = self.tokenizer.encode(prompt)
        if sampling.length == "sampled":
            target_tokens = draw_target_tokens(self.window_tokens, len(ids), target_tokens, seed)
        return Request(ids, target_tokens, seed)

    def _cut(self, tokens: list[int], sampling: SamplingConfig) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self.tokenizer.end_ids]
        return tokens[: ends[0]] if sampling.length != "oracle" and ends else tokens

    @torch.no_grad()
    def _pieces(self, requests: list[Request], sampling: SamplingConfig) -> Iterator[list[list[int]]]:
        from megatext.generation import blockwise, oneshot

        check_sampling(sampling, self.flow)
        if not requests:
            yield []
            return
        self._check_prompts([request.prompt for request in requests])
        with self._evaluating():
            yield from (blockwise if self.flow.block_tokens else oneshot).generate(self, requests, sampling)

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        if self.flow.unconditional_probability == 1 and not self.flow.block_tokens and any(prompts):
            raise ConfigError('the model was trained to write from nothing only: its prompt is ""')

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    def grid(self, sampling: SamplingConfig) -> Tensor:
        """The timesteps of a call, float32 `[steps + 1]`, from 1 to 0."""
        return self.flow.timesteps.inference_grid(sampling.steps, sampling.grid).to(self.device)

    def denoise(
        self,
        noise: Noise,
        sampling: SamplingConfig,
        predict: Predictor,
        decode: Callable[[Tensor], Tensor],
        counted: Tensor,
        observe: Callable[[Tensor], None],
    ) -> Tensor:
        """From pure noise to what the model last saw at the clean end: token ids `[rows, columns]` where the model
        ends in logits, latents `[rows, columns, channels]` where it does not; `decode` makes logits of these.
        `counted` bool `[rows, columns]`: what is to be written; `observe` is told the tokens after every step."""
        channels = self.vae.config.latent_channels
        table, feeds_back = self.module.table, self.module.network.config.self_conditioning
        barred = self.barred(sampling)
        last: dict[str, Tensor] = {"left": counted.any(dim=1)}

        def keep(final: Tensor, logits: Tensor | None = None) -> None:
            """Note what would be written now, but of texts that are already left as they are."""
            left = last["left"].view(-1, *[1] * (final.ndim - 1))
            last["final"] = torch.where(left, final, last.get("final", final))
            if logits is not None:
                last["logits"] = logits

        def finished() -> bool:
            """Look at a step: tell the observer, and leave texts as they are whose every token is sure."""
            if sampling.exit_margin == 0 and self.observer is None:
                return False
            logits = last["logits"] if table is not None else decode(last["final"]).masked_fill(barred, -torch.inf)
            if self.observer is not None:
                observe(last["final"] if table is not None else logits.argmax(dim=-1))
            if sampling.exit_margin == 0:
                return False
            first, second = logits.float().softmax(dim=-1).topk(2, dim=-1).values.unbind(-1)
            sure = (first - second >= sampling.exit_margin) | ~counted
            last["left"] = last["left"] & ~sure.all(dim=1)
            return not bool(last["left"].any())

        def x0(z: Tensor, t: Tensor) -> Tensor:
            previous = last.get("x0") if feeds_back else None
            guided = guidance.active(float(t), sampling.guidance_scale, sampling.guidance_interval)
            predicted, without = predict(z, t, previous, guided)
            if without is not None:
                predicted = guidance.combine(predicted, without, sampling.guidance_scale)
            every = t.expand(z.shape[:2])
            if table is None:
                last["x0"] = self.module.x0(z, every, predicted)
                keep(last["x0"])
                return last["x0"]
            logits = self.module.logits(predicted, z, every).masked_fill(barred, -torch.inf)
            last["x0"] = objectives.expected_latent(logits, table, sampling.temperature)
            if sampling.solver != "ancestral":
                keep(logits.argmax(dim=-1), logits)
                return last["x0"]
            drawn = draw_tokens(logits, sampling.temperature, noise.uniform())
            keep(drawn, logits)
            return table[drawn]

        first, grid = noise.normal(channels), self.grid(sampling)
        sample(x0, self.module.path, first, grid, sampling.solver, lambda: noise.normal(channels), finished)
        return last["final"]

    @property
    def device(self) -> torch.device:
        return self.module.network.latent_in.weight.device

    def barred(self, sampling: SamplingConfig) -> Tensor:
        """bool `[vocab_size]`: entries that are never written. With `oracle` lengths the end of text is among them, as
        for autoregressive baselines: a text that is told its length does not end before it."""
        barred = torch.zeros(self.vae.vocab_size, dtype=torch.bool, device=self.device)
        if sampling.length == "oracle":
            barred[[*self.tokenizer.end_ids, self.tokenizer.pad_id]] = True
        return barred

    def tokens_of(self, final: Tensor, decode: Callable[[Tensor], Tensor], sampling: SamplingConfig) -> Tensor:
        """Token ids `[rows, columns]` of what `denoise` returned: themselves, or the likeliest by `decode` that may be
        written."""
        if self.module.table is not None:
            return final
        return decode(final).masked_fill(self.barred(sampling), -torch.inf).argmax(dim=-1)

    def latents_of(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Standardised latents (posterior mean) of clean tokens."""
        if self.module.table is not None:
            return self.module.table[tokens]
        return self.vae.standardise(self.vae.encode(tokens, layout)[0])
