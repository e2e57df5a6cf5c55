"""Any Hugging Face causal LM as a writer of continuations."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.files import hash_of, hash_of_model
from evaluation.hub import text_start
from evaluation.metrics.perplexity import Judge
from evaluation.systems.base import Item, Nats, System, Written, item_seed, own_tokens, writing_code
from megatext.config import ConfigError
from megatext.tokenizer import Tokenizer, load_tokenizer
from megatext.training.cost import total_flops


@dataclass(frozen=True)
class CausalSampling:
    """How a Hugging Face causal LM is sampled."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this much probability together."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    guidance_scale: float = 1.0
    """w: logits l0 + w (l - l0), where l0 sees of the prefix its last token alone (arXiv 2306.17806, eq. 7); twice the
    work. 1 does without. Of a text so long that its prefix has left the model's window nothing is guided."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.guidance_scale < 0:
            raise ConfigError("sampling: needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and guidance_scale >= 0")


class CausalLM(System):
    """A Hugging Face causal LM: left padding, key-value cache, a generator a text.

    The end of text is barred unless the length is free, which gives every system the same length, as the diffusion
    models have it. Contexts that do not fit beside what is written are cut at their start, and the cuts are counted.
    """

    def __init__(self, directory: Path, sampling: CausalSampling, *, dtype: str = "fp32", device: str = "cpu") -> None:
        self.weights = hash_of_model(directory)
        self.training_flops = total_flops(directory)
        self._directory, self._sampling, self._dtype, self._device = directory, sampling, dtype, device
        self.sampled_by = asdict(sampling)

    def fingerprint(self) -> str:
        return hash_of(["hf", self.weights, asdict(self._sampling), self._dtype, writing_code(Path(__file__))])

    @cached_property
    def model(self) -> Any:
        """The loaded network."""
        from transformers import AutoModelForCausalLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self._dtype]
        return AutoModelForCausalLM.from_pretrained(self._directory, dtype=dtype).eval().to(self._device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._directory)

    @torch.inference_mode()
    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        prefixes = [self.tokenizer.encode(item.prefix) for item in items]
        left = [own_tokens(item, self.tokenizer) for item in items]
        free = items[0].length.policy == "free"
        seeds = [item_seed(seed, item) for item in items]
        written: list[list[int]] = [[] for _ in items]
        cuts = [0] * len(items)
        lap = 0
        while rows := [i for i, count in enumerate(left) if count]:
            prompts, nulls, counts = [], [], []
            for i in rows:
                prompt, count = self._fit(prefixes[i] + written[i], left[i])
                cuts[i] = cuts[i] or len(prefixes[i]) + len(written[i]) - len(prompt)
                prompts.append(prompt)
                nulls.append((prefixes[i][-1:] + written[i])[-len(prompt) :] if prompt else [])
                counts.append(count)
            # A lap has a seed of its own: how far the one before was drawn depends on the rows beside it.
            found = self._write(prompts, nulls, counts, [seeds[i] + lap for i in rows], free)
            for i, new, count in zip(rows, found, counts, strict=True):
                kept = self._until_end(new) if free else new
                written[i] += kept
                left[i] = left[i] - count if len(kept) == count else 0
            lap += 1
        return [Written(self._decode(p, w), prefix_cut=c) for p, w, c in zip(prefixes, written, cuts, strict=True)]

    def log_likelihood(self, items: Sequence[Item], seed: int, **by: Any) -> list[Nats]:
        """At temperature 1, of tokens of its own; the end of text is not among them."""
        if self._sampling.guidance_scale != 1:
            raise ConfigError("likelihood: of a guided causal LM it is not known; leave one of the two out of the row")
        pairs = [(self.tokenizer.encode(item.prefix), self.tokenizer.encode(item.target)) for item in items]
        found = self._judge.score(pairs)
        for item, (_, ids), nll in zip(items, pairs, found, strict=True):
            if nll.cut or nll.tokens < len(ids):
                raise ConfigError(
                    f"likelihood: {self._directory} does not read all of {item.id}; leave it out of the row"
                )
        return [Nats(nll.nats, [], "exact") for nll in found]

    @cached_property
    def _judge(self) -> Judge:
        return Judge(self._directory, device=self._device, dtype=self.model.dtype)

    @cached_property
    def start(self) -> list[int]:
        """What stands before every text."""
        return text_start(self.tokenizer, self.model.config)

    @cached_property
    def ends(self) -> set[int]:
        """Every token that ends a text: of documents, and of turns in models that were taught to talk."""
        given = [self.model.config.eos_token_id, getattr(self.model.generation_config, "eos_token_id", None)]
        flat = [i for ids in given for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        return {self.tokenizer.eos_id, *flat}

    @cached_property
    def limit(self) -> int:
        """Tokens the model reads at once."""
        return getattr(self.model.config, "max_position_embeddings", None) or 1 << 30

    def _fit(self, context: list[int], tokens: int) -> tuple[list[int], int]:
        """The end of a context that fits beside `tokens` new ones, and how many are written before the window moves.

        Half of what the model reads is left to the context, so a text longer than the other half takes several laps."""
        limit = self.limit - len(self.start)
        kept = context[-max(limit - tokens, limit // 2) :]
        return kept, min(tokens, limit - max(1, len(kept)))

    def _write(
        self, prompts: list[list[int]], nulls: list[list[int]], counts: list[int], seeds: list[int], free: bool
    ) -> list[list[int]]:
        """counts[i] new token ids behind each prompt; nulls: what guidance compares with, read where there is any."""
        guided = self._sampling.guidance_scale != 1
        if guided:
            prompts = prompts + nulls
        # With nothing before it, a text begins behind the end of another, as documents do in training.
        prompts = [[*self.start, *prompt] or [self.tokenizer.eos_id] for prompt in prompts]
        generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self._device)
        barred, ended = self._barred(free), torch.zeros(len(seeds), dtype=torch.bool, device=self._device)
        written: list[Tensor] = []
        cache = None
        for _ in range(max(counts)):
            # Rows that have all their tokens go on beside longer ones: what they draw is dropped, but has a place.
            positions = (mask.cumsum(dim=1) - 1).clamp(0, self.limit - 1)[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                kind = self.model.config.model_type
                raise ConfigError(
                    f"{self._directory}: a {kind} keeps no key-value cache, and cannot be written with here"
                )
            logits = output.logits[:, -1].float()
            if guided:
                given, null = logits.log_softmax(dim=-1).chunk(2)
                logits = null + self._sampling.guidance_scale * (given - null)
            ids = self._draw(logits.masked_fill(barred, -torch.inf), generators)[:, None]
            written.append(ids)
            if free:
                ended |= torch.isin(ids[:, 0], torch.tensor(sorted(self.ends), device=ids.device))
                if bool(ended.all()):
                    break
            ids = ids.repeat(2, 1) if guided else ids
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return [row[:count] for row, count in zip(torch.cat(written, dim=1).tolist(), counts, strict=True)]

    def _barred(self, free: bool) -> Tensor:
        """bool [vocabulary]: entries that are never written; rows that pad the table, and the ends unless free."""
        rows = self.model.config.vocab_size
        barred = torch.zeros(rows, dtype=torch.bool, device=self._device)
        never = {self.tokenizer.pad_id, self.model.config.bos_token_id}
        barred[
            [i for i in (never - self.ends if free else never | self.ends) if isinstance(i, int) and 0 <= i < rows]
        ] = True
        barred[self.tokenizer.vocab_size :] = True
        return barred

    def _draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Token ids [rows] from logits [rows, vocabulary], each row by its own generator (Gumbel argmax)."""
        sampling = self._sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / sampling.temperature
        if sampling.top_k:
            least = logits.topk(min(sampling.top_k, logits.shape[1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if sampling.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(dim=-1)
            ordered = ordered.masked_fill(share.cumsum(dim=-1) - share >= sampling.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(1, order, ordered)
        noise = torch.stack([torch.rand(logits.shape[1], generator=g, device=g.device) for g in generators])
        return (logits - (-noise.clamp(min=1e-20).log()).log()).argmax(dim=-1)

    def _until_end(self, row: list[int]) -> list[int]:
        return row[: next((i for i, token in enumerate(row) if token in self.ends), len(row))]

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        """The new text; decoded behind its prompt, because some tokenizers drop a space at the start of a text."""
        before = self.tokenizer.decode(prompt)
        whole = self.tokenizer.decode(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)
