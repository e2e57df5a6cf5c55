"""Writing in blocks with caches: the same texts as without any, prompts without padding, stopping, smaller blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from megatext.config import ConfigError
from megatext.generation import SamplingConfig, TextGenerator, blockwise
from megatext.generation.noise import Noise, Request
from megatext.nn.attention import make_mask
from megatext.nn.layout import CONTEXT, TARGET, Layout
from tests.generation.test_text_generator import export

SAMPLING = SamplingConfig(steps=4, guidance_scale=3.0)


@pytest.fixture
def generator(tmp_path: Path, tokenizer_directory: Path) -> TextGenerator:
    """A causal VAE and a DiT in blocks of 4, also trained in blocks of 2; random weights."""
    return TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "cola"))


def write(generator: TextGenerator, requests: list[Request], sampling: SamplingConfig) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in requests]
    for pieces in generator._pieces(requests, sampling):
        for text, piece in zip(texts, pieces, strict=True):
            text.extend(piece)
    return texts


def write_without_caches(generator: TextGenerator, request: Request, sampling: SamplingConfig, size: int) -> list[int]:
    """One text, everything computed anew at every step: two streams of the whole text in one row, guidance in a pass
    of its own, plain Euler steps."""
    vae, module, barred = generator.vae, generator.module, generator.barred(sampling)
    tokens, total = list(request.prompt), len(request.prompt) + request.target_tokens
    history = torch.zeros(0, vae.config.latent_channels)  # standardised latents of whole blocks
    grid = generator.grid(sampling)

    def encoded(ids: list[int]) -> Tensor:
        position = torch.arange(len(ids))[None]
        layout = vae.layout(torch.zeros_like(position), position)
        return vae.standardise(vae.encode(torch.tensor([ids]), layout)[0])[0]

    def predict(z: Tensor, clean: Tensor, t: Tensor, given: int, previous: Tensor | None) -> Tensor:
        n = len(clean)
        position = torch.cat((torch.arange(n), start + torch.arange(size)))[None]
        layouts = Layout.of(torch.zeros_like(position), position, block_tokens=size)
        role = torch.tensor([[CONTEXT] * n + [TARGET] * size])
        index = torch.tensor([[0] * (n + given) + [1] * (size - given)])
        estimate = None if previous is None else torch.cat((torch.zeros(n, z.shape[1]), previous))[None]
        left_is_clean = [n > 0, *(column < given for column in range(size - 1))]
        left = [tokens[start + i - 1] if clean_left else -1 for i, clean_left in enumerate(left_is_clean)]
        out, _ = module.network(
            torch.cat((clean, z))[None],
            torch.stack((torch.zeros(()), t)),
            index,
            position,
            role == TARGET,
            make_mask("two_stream", replace(layouts, role=role), backend="dense"),
            self_condition=estimate,
            alone=(role == TARGET) & (n == 0),
            tokens=torch.tensor([tokens[:n]], dtype=torch.long),
            neighbours=torch.tensor([[-1] * n + left]),
        )
        return out[0, n:]

    while len(tokens) < total:
        start = len(tokens) // size * size
        given = len(tokens) - start
        if sampling.history == "tokens" or len(history) < start <= len(request.prompt):
            history = encoded(tokens[:start]) if start else history
        pinned = encoded(tokens)[start:] if given else history[:0]
        noise = Noise([request], [start], [(0, size)], torch.device("cpu"))
        z, previous = noise.normal(vae.config.latent_channels)[0], None
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            z = torch.cat((pinned, z[given:]))
            predicted = predict(z, history, t, given, previous)
            low, high = sampling.guidance_interval
            if len(history) and low <= t <= high:
                alone = predict(z, history[:0], t, given, previous)
                predicted = alone + sampling.guidance_scale * (predicted - alone)
            if module.table is None:
                x0 = z - t * predicted
            else:
                logits = module.logits(predicted, z, t.expand(size)).masked_fill(barred, -torch.inf)
                x0 = logits.softmax(dim=-1) @ module.table
            previous = torch.cat((pinned, x0[given:]))
            z = z + (t_next - t) / t * (z - x0)
        block = torch.cat((pinned, z[given:]))
        latents = torch.cat((history, block))
        if module.table is None:
            position = torch.arange(len(latents))[None]
            whole = vae.decode(vae.unstandardise(latents)[None], vae.layout(torch.zeros_like(position), position))[0]
            logits = whole[start:].masked_fill(barred, -torch.inf)
        tokens += logits.argmax(-1)[given:].tolist()
        history = latents if sampling.history == "latents" else history
    return tokens[len(request.prompt) : total]


REQUESTS = [Request([7, 9, 11, 5, 6, 30], 11, 0), Request([8] * 4, 9, 1), Request([], 8, 2), Request([4, 5], 1, 3)]


@pytest.mark.parametrize(
    ("name", "history", "size"),
    [
        ("cola", "tokens", 4),
        ("cola", "tokens", 2),
        ("cola", "latents", 4),
        ("cola", "latents", 2),
        ("blocks", "tokens", 4),
    ],
)
@torch.no_grad()
def test_texts_are_those_without_caches(
    name: str, history: Literal["tokens", "latents"], size: int, tmp_path: Path, tokenizer_directory: Path
) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    texts = []
    for interval in ((0.0, 1.0), (0.0, 0.9)):  # the block before is read in a step with guidance, or without
        sampling = replace(SAMPLING, history=history, block_tokens=size, guidance_interval=interval)
        texts.append([write_without_caches(generator, request, sampling, size) for request in REQUESTS])
        assert write(generator, REQUESTS, sampling) == texts[-1]
    assert len({tuple(text) for text in texts[0]}) == 4 and [len(text) for text in texts[0]] == [11, 9, 8, 1]
    assert texts[0] != texts[1]


def test_the_ways_differ(generator: TextGenerator) -> None:
    """History, block size and guidance are not dead options."""
    ways = [
        SAMPLING,
        replace(SAMPLING, history="latents"),
        replace(SAMPLING, block_tokens=2),
        replace(SAMPLING, guidance_scale=1.0),
    ]
    texts = [write(generator, REQUESTS[:2], way) for way in ways]
    assert all(a != b for i, a in enumerate(texts) for b in texts[:i])
    assert write(generator, REQUESTS[:2], replace(SAMPLING, block_tokens=4)) == texts[0]


@pytest.mark.parametrize("chunk", [4, blockwise.PREFILL_TOKENS])
def test_prompts_are_read_without_padding(
    chunk: int, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No column of a shorter prompt is computed, and chunks do not change the text."""
    requests = [Request([5 + i % 20 for i in range(n)], 3, n) for n in (26, 9, 3, 16)]
    whole = write(generator, requests, SAMPLING)
    monkeypatch.setattr(blockwise, "PREFILL_TOKENS", chunk)
    read: list[int] = []
    handle = generator.module.network.register_forward_hook(
        lambda module, args, kwargs, output: read.append(args[0].shape[0] * kwargs.get("history", 0)),
        with_kwargs=True,
    )
    writer = blockwise._Writer(generator, requests, SAMPLING)
    with torch.no_grad():
        writer.read_prompts()
    handle.remove()
    assert sum(read) == 24 + 8 + 0 + 16 and writer.committed.tolist() == [24, 8, 0, 16]
    assert write(generator, requests, SAMPLING) == whole


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_block_costs_its_steps_and_no_pass_more(guidance_scale: float, generator: TextGenerator) -> None:
    """A written block is read beside the first step of the next, and under guidance both passes are one, but where
    nothing stands before a block."""
    passes: list[tuple[int, ...]] = []
    generator.module.network.register_forward_hook(lambda module, args, output: passes.append(args[0].shape[:2]))
    block = 4 * (1 if guidance_scale == 1 else 2)
    first, others = [(1, block)] * 4, [(1, 4 + block), *[(1, block)] * 3]
    for prompt, expected in (([7] * 8, [(1, 8), *first, *others, *others]), ([], [(1, 4)] * 4 + others + others)):
        passes.clear()
        write(generator, [Request(prompt, 12, 0)], replace(SAMPLING, guidance_scale=guidance_scale))
        assert passes == expected


class EndsAt(torch.nn.Module):
    """Logits that end the text at the hidden states it is told to, by their order of appearance."""

    def __init__(self, unembedding: torch.nn.Module, eos: int, column: int) -> None:
        super().__init__()
        self.unembedding, self.eos, self.column = unembedding, eos, column

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.unembedding(hidden).clone()
        logits[..., self.eos] = -1e5
        logits[0, self.column, self.eos] = 1e5  # the first row of every call
        return logits


def test_a_row_that_ends_takes_no_further_part(generator: TextGenerator) -> None:
    eos, requests = generator.tokenizer.eos_id, REQUESTS[:3]
    free = write(generator, requests, replace(SAMPLING, length="eos"))
    generator.vae.unembedding = EndsAt(generator.vae.unembedding, eos, column=3)  # type: ignore[assignment]
    sampling = replace(SAMPLING, length="eos")
    pieces = list(generator._pieces(requests, sampling))
    # at the first block's last token; then the second row has become the first, and ends at the second block's
    by_row = [[piece[row] for piece in pieces] for row in range(3)]
    assert [[len(piece) for piece in row] for row in by_row] == [[2, 0], [4, 4], [4, 4]]
    assert by_row[0][0][-1] == by_row[1][1][-1] == eos and not any(eos in piece for piece in (by_row[1][0], *by_row[2]))
    assert by_row[1][0] == free[1][:4] and by_row[2] == [free[2][:4], free[2][4:]]
    text = "".join(generator.stream("the cat sat", sampling=sampling))
    assert text == generator.generate(["the cat sat"], target_tokens=[256], seeds=[0], sampling=sampling)[0]


def test_streaming_ends_by_itself(generator: TextGenerator) -> None:
    """Without options: block by block up to the end of text."""
    eos = generator.tokenizer.eos_id
    generator.vae.unembedding = EndsAt(generator.vae.unembedding, eos, column=2)  # type: ignore[assignment]
    pieces = list(generator.stream("the cat sat on"))
    assert len(pieces) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"block_tokens": 3}, "block_tokens 3: the model is trained in blocks of 2, 4"), ({"temperature": 0.5}, "token")],
)
def test_what_a_model_cannot_do(generator: TextGenerator, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(generator, REQUESTS[:1], replace(SAMPLING, **changes))  # type: ignore[arg-type]


def test_nothing_asked_for(generator: TextGenerator) -> None:
    assert write(generator, [], SAMPLING) == []
    assert write(generator, [Request([5, 6, 7], 0, 0)], SAMPLING) == [[]]
