"""Generation: a text is a function of its own prompt, length and seed, and survives export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatext.config import ConfigError
from megatext.flow.timesteps import TimestepConfig
from megatext.generation.noise import Noise, Request, draw_tokens
from megatext.generation.text_generator import TextGenerator
from megatext.nn.blocks import TrunkConfig
from megatext.nn.dit import TextDiTConfig
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes.denoiser import make_denoiser
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.pretrained import write_model
from megatext.recipes.sampling import SamplingConfig
from megatext.recipes.text_dit import TextDiTRecipeConfig
from megatext.tokenizer import load_tokenizer

TRUNK = TrunkConfig(layers=2, width=16, heads=2)
PROMPTS = ["the cat sat on the mat", "a", "", "and then it was very big and the dog ran"]
LENGTHS = [9, 5, 12, 3]
SYSTEMS = {
    "blocks": (
        FlowConfig(
            objective="token_cross_entropy",
            block_tokens=4,
            token_likelihood=True,
            timesteps=TimestepConfig(location=1.0),
        ),
        0,
    ),
    "blocks_velocity": (FlowConfig(objective="velocity", block_tokens=4), 0),
    "cola": (FlowConfig(objective="velocity", block_tokens=4, training_block_tokens=(2, 4)), 2),
    "one_shot": (FlowConfig(objective="velocity", infill_probability=0.3), 2),
    "one_shot_zeros": (FlowConfig(objective="velocity", null_condition="zeros"), 2),
}


def export(
    directory: Path,
    tokenizer: Path,
    name: str,
    causal: bool = False,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 frozen
) -> Path:
    """A model with random weights, exported."""
    flow, encoder_layers = SYSTEMS[name]
    torch.manual_seed(1)
    network = TextDiTConfig(
        trunk=TRUNK,
        token_embedding=name == "blocks",
        null_embedding=name in ("blocks", "cola", "null_embedding"),
        self_conditioning=True,
        output="tokens" if flow.objective == "token_cross_entropy" else "latent",
    )
    causal = causal or name == "cola"
    attention = "causal" if causal else "full"
    vae_config = TextVAEConfig(
        latent_channels=6,
        encoder=replace(TRUNK, layers=2 if causal else encoder_layers),
        decoder=TRUNK,
        attention=attention,
    )
    vae = TextVAE(vae_config, load_tokenizer(tokenizer).vocab_size)
    write_model(directory / "vae_source", "text_vae", vae_config, vae.state_dict(), tokenizer=tokenizer)
    config = TextDiTRecipeConfig(vae=str(directory / "vae_source"), network=network, flow=flow, sampling=sampling)
    module = make_denoiser(config.network, config.flow, vae)
    weights = {n: torch.randn(p.shape) * 0.4 for n, p in module.network.state_dict().items()}
    if network.token_embedding:
        del weights["head.weight"]
    write_model(directory / "dit", "text_dit", config, weights, tokenizer=tokenizer, vae=directory / "vae_source")
    return directory / "dit"


@pytest.fixture(params=sorted(SYSTEMS))
def generator(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_directory: Path) -> TextGenerator:
    return TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, request.param))


def test_a_model_writes_as_its_description_says_where_a_call_does_not(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    own = SamplingConfig(steps=3, grid="uniform", guidance_scale=4.0, guidance_interval=(0.1, 0.9))
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "one_shot", sampling=own))
    assert generator.sampling == own
    asked: dict[str, Any] = {"target_tokens": [9], "seeds": [3]}
    written = generator.generate(["the cat"], **asked)
    assert written == generator.generate(["the cat"], **asked, sampling=own)
    assert written != generator.generate(["the cat"], **asked, sampling=SamplingConfig())
    assert len(generator.trace("the cat")) == 3
    streamed = "".join(generator.stream("the cat", target_tokens=9, seed=3))
    assert streamed == generator.generate(["the cat"], **asked, sampling=replace(own, length="eos"))[0]
    asked = {"target_tokens": [32] * 4, "seeds": [5, 6, 7, 8]}
    assert generator.preview(5) == generator.generate([""] * 4, **asked)
    # a training knows no lengths, and its ranks write together: as many tokens and passes, whatever is written
    generator.sampling = replace(own, length="sampled", exit_margin=1e-6)
    assert generator.preview(5) == generator.generate([""] * 4, **asked, sampling=own)


def test_an_export_that_says_nothing_of_sampling(tmp_path: Path, tokenizer_directory: Path) -> None:
    directory = export(tmp_path, tokenizer_directory, "one_shot")
    described = json.loads((directory / "config.json").read_text())
    del described["config"]["sampling"]
    (directory / "config.json").write_text(json.dumps(described))
    assert TextGenerator.from_pretrained(directory).sampling == SamplingConfig()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_text_does_not_depend_on_its_neighbours(generator: TextGenerator, guidance_scale: float) -> None:
    solver = "ancestral" if generator.module.table is not None else "euler"
    sampling = SamplingConfig(steps=4, guidance_scale=guidance_scale, solver=solver)
    seeds = [5, 6, 7, 8]
    together = generator.generate(PROMPTS, target_tokens=LENGTHS, seeds=seeds, sampling=sampling)
    for i in range(4):
        alone = generator.generate([PROMPTS[i]], target_tokens=[LENGTHS[i]], seeds=[seeds[i]], sampling=sampling)
        assert alone == [together[i]]
    others = generator.generate(PROMPTS, target_tokens=LENGTHS, seeds=[9, 10, 11, 12], sampling=sampling)
    assert others != together


def test_nothing_asked_for_is_nothing_written(generator: TextGenerator) -> None:
    assert generator.generate([], target_tokens=[], seeds=[]) == []
    assert generator.generate(["the quick", "a"], target_tokens=[0, 3], seeds=[0, 0])[0] == ""
    assert generator.generate(["the"], target_tokens=[0], seeds=[0]) == [""]
    assert "".join(generator.stream("the", target_tokens=0)) == ""
    assert generator.log_likelihood([], []) == []


def test_streaming_gives_the_same_text(generator: TextGenerator) -> None:
    sampling = SamplingConfig(steps=3)
    pieces = list(generator.stream(PROMPTS[0], target_tokens=11, seed=4, sampling=sampling))
    assert "".join(pieces) == generator.generate([PROMPTS[0]], target_tokens=[11], seeds=[4], sampling=sampling)[0]
    assert len(pieces) == 1 if not generator.flow.block_tokens else len(pieces) > 1


def test_streaming_never_shows_half_a_character(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece spells a character it does not know in bytes, which may lie in two blocks."""
    tokens = generator.tokenizer.encode("the é cat")
    monkeypatch.setattr(generator, "_pieces", lambda requests, sampling: ([[token]] for token in tokens))
    pieces = list(generator.stream("", target_tokens=len(tokens)))
    assert "".join(pieces) == generator.tokenizer.decode(tokens)
    assert "é" in "".join(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_a_sampled_length_is_that_of_a_text_of_training(generator: TextGenerator) -> None:
    """As if it had been asked for; the end of text is not barred, and cuts."""
    ids = len(generator.tokenizer.encode(PROMPTS[0]))
    generator.window_tokens = [2, ids + 3]
    given = {name: SamplingConfig(steps=2, length=name) for name in ("sampled", "eos")}  # type: ignore[arg-type]
    drawn = generator.generate(PROMPTS[:1], target_tokens=[40], seeds=[5], sampling=given["sampled"])
    assert drawn == generator.generate(PROMPTS[:1], target_tokens=[3], seeds=[5], sampling=given["eos"])
    assert drawn == ["".join(generator.stream(PROMPTS[0], target_tokens=40, seed=5, sampling=given["sampled"]))]
    generator.window_tokens = []
    with pytest.raises(ConfigError, match="without the lengths"):
        generator.generate(PROMPTS[:1], target_tokens=[40], seeds=[5], sampling=given["sampled"])


def test_heun_and_uniform_grids_run(generator: TextGenerator) -> None:
    sampling = SamplingConfig(steps=3, solver="heun", grid="uniform")
    assert len(generator.generate(["the"], target_tokens=[6], seeds=[0], sampling=sampling)) == 1
    assert generator.grid(sampling).tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    by_quantiles = generator.grid(replace(sampling, grid="quantile")).tolist()
    expected = [float(generator.flow.timesteps.quantile(torch.tensor([u]))) for u in (2 / 3, 1 / 3)]
    assert by_quantiles == pytest.approx([1.0, *expected, 0.0], abs=1e-5)


def test_exports_of_what_a_training_now_refuses_write_as_they_did(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for null_condition in ("drop", "zeros"):  # in blocks the latter never had an effect
        flow = replace(SYSTEMS["blocks"][0], null_condition=null_condition)  # type: ignore[arg-type]
        monkeypatch.setitem(SYSTEMS, "blocks", (flow, 0))
        generator = TextGenerator.from_pretrained(export(tmp_path / null_condition, tokenizer_directory, "blocks"))
        sampling = SamplingConfig(steps=2, guidance_scale=2.0)
        texts.append(generator.generate(PROMPTS[:1], target_tokens=[9], seeds=[0], sampling=sampling))
    assert texts[0] == texts[1]


def test_guidance_costs_a_second_pass_in_its_interval_alone(generator: TextGenerator) -> None:
    predicted: list[int] = []
    generator.module.network.register_forward_hook(
        lambda module, args, output: predicted.append(output[0].shape[0] * output[0].shape[1]),
    )
    request = [Request(generator.tokenizer.encode(PROMPTS[0])[:4], 4, 0)]

    def write(**options: Any) -> tuple[list[list[list[int]]], list[int]]:
        predicted.clear()
        text = list(generator._pieces(request, SamplingConfig(steps=4, grid="uniform", **options)))
        return text, [tokens for tokens in predicted if tokens]  # reading the prompt predicts nothing

    plain, once = write()
    for interval in ((0.0, 1.0), (0.5, 0.7), (0.0, 0.0)):
        text, tokens = write(guidance_scale=3.0, guidance_interval=interval)
        assert tokens == [
            n * (1 + (interval[0] <= t <= interval[1])) for n, t in zip(once, [1, 0.75, 0.5, 0.25], strict=True)
        ]
        assert interval != (0.0, 0.0) or text == plain


@pytest.mark.parametrize(("name", "causal"), [("blocks", False), ("blocks_velocity", True)])
def test_cached_generation_equals_the_whole_row(
    name: str, causal: bool, tmp_path: Path, tokenizer_directory: Path
) -> None:
    """A block is denoised as training saw it: two streams in one row, no cache, the same velocities."""
    from megatext.nn.attention import make_mask
    from megatext.nn.layout import TARGET, Layout

    generator = TextGenerator.from_pretrained(export(tmp_path / name, tokenizer_directory, name, causal))
    prompt = generator.tokenizer.encode("the cat sat on the mat and the dog ran under the tree")[:10]
    seen: list[torch.Tensor] = []
    network = generator.module.network
    handle = network.register_forward_hook(
        lambda module, args, output: seen.append(output[0]) if output[0].shape[1] else None
    )
    text = generator.tokenizer.decode(prompt)
    assert generator.tokenizer.encode(text) == prompt
    generator.generate([text], target_tokens=[2], seeds=[3], sampling=SamplingConfig(steps=1))
    handle.remove()
    tokens = torch.tensor([prompt + [0, 0]])
    position = torch.arange(12)[None]
    clean = Layout.of(torch.zeros_like(position), position, block_tokens=4)
    noisy_layout = clean.with_role(TARGET)
    latents = generator.latents_of(tokens, clean)
    noise = torch.zeros_like(latents)
    noise[:, 8:] = Noise([Request(prompt, 2, 3)], [8], [(0, 4)], torch.device("cpu")).normal(latents.shape[-1])
    noisy = torch.where(position[..., None] < 10, latents, noise)
    t, index, target = torch.tensor([0.0, 1.0]), (position >= 10).long(), torch.ones_like(position, dtype=torch.bool)
    _, past = network(
        latents, t, torch.zeros_like(index), position, ~target, make_mask("two_stream", clean), tokens=tokens
    )
    neighbours = torch.where((position > 0) & (position <= 10), tokens.roll(1, dims=1), -1)
    mask = make_mask("two_stream", noisy_layout, Layout.concatenate([clean, noisy_layout]))
    out, _ = network(noisy, t, index, position, target, mask, neighbours=neighbours, past=past)
    torch.testing.assert_close(out[:, 8:], seen[0], rtol=1e-4, atol=1e-4)


def test_prompt_is_repainted_not_rewritten(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Lengths are counted from the end of the prompt, also where it ends inside a block."""
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "blocks"))
    for words in range(1, 6):
        prompt = " ".join(["the", "cat", "sat", "on", "mat"][:words])
        pieces = [
            p
            for (p,) in generator._pieces(
                [Request(generator.tokenizer.encode(prompt), 7, 0)],
                SamplingConfig(steps=2),
            )
        ]
        assert sum(len(p) for p in pieces) == 7


def test_end_of_text_cuts(tmp_path: Path, tokenizer_directory: Path) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "blocks"))
    eos = generator.tokenizer.eos_id
    assert generator._cut([7, 8, eos, 9], SamplingConfig(length="eos")) == [7, 8]
    assert generator._cut([7, 8, eos, 9], SamplingConfig()) == [7, 8, eos, 9]


def test_no_text_ends_before_the_length_it_is_told(generator: TextGenerator) -> None:
    eos = generator.tokenizer.eos_id
    written: dict[str, list[int]] = {}
    with torch.no_grad():  # a model that would rather end everywhere
        if generator.module.table is not None:
            head = generator.module.network.head
            generator.module.network.head = torch.nn.Sequential(head, Prefers(eos))
        else:
            unembedding = generator.vae.unembedding
            generator.vae.unembedding = torch.nn.Sequential(unembedding, Prefers(eos))  # type: ignore[assignment]
    for length in ("oracle", "eos"):
        sampling = SamplingConfig(steps=2, length=length)  # type: ignore[arg-type]
        written[length] = [t for (piece,) in generator._pieces([Request([5, 6], 8, 0)], sampling) for t in piece]
    assert eos not in written["oracle"] and len(written["oracle"]) == 8
    # blocks stop where they meet the end; one shot has written all by then
    assert written["eos"] == [eos] * (1 if generator.flow.block_tokens else 8)


class Prefers(torch.nn.Module):
    """Logits that all but choose one token."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(-1, torch.tensor([self.token]), torch.full((*logits.shape[:-1], 1), 1e5))


def test_another_vae_is_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    directory = export(tmp_path, tokenizer_directory, "blocks")
    weights = directory / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ConfigError, match="not the VAE this model was trained on"):
        TextGenerator.from_pretrained(directory)


def test_clear_errors(tmp_path: Path, tokenizer_directory: Path) -> None:
    with pytest.raises(ConfigError, match="export the model first"):
        TextGenerator.from_pretrained(tmp_path)
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "one_shot"))
    with pytest.raises(ConfigError, match="temperature"):
        generator.generate(["a"], target_tokens=[3], seeds=[0], sampling=SamplingConfig(temperature=0.5))
    with pytest.raises(ValueError, match="one of each"):
        generator.generate(["a", "b"], target_tokens=[3], seeds=[0])
    with pytest.raises(ConfigError, match="ancestral"):
        generator.generate(["a"], target_tokens=[3], seeds=[0], sampling=SamplingConfig(solver="ancestral"))
    generator.flow = replace(generator.flow, unconditional_probability=1.0)
    with pytest.raises(ConfigError, match="from nothing only"):
        generator.generate(["a"], target_tokens=[3], seeds=[0])
    assert generator.generate([""], target_tokens=[3], seeds=[0])


def test_a_text_ends_at_any_end_that_the_vocabulary_has(tmp_path: Path, tokenizer_directory: Path) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "one_shot"))
    generator.tokenizer.end_ids = (generator.tokenizer.eos_id, 9)
    assert generator._cut([7, 9, generator.tokenizer.eos_id], SamplingConfig(length="eos")) == [7]
    assert generator.barred(SamplingConfig())[9] and not generator.barred(SamplingConfig(length="eos")).any()


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.randn(1, 1, 7)
    u = (torch.arange(20_000) + 0.5) / 20_000
    drawn = draw_tokens(logits.expand(1, 20_000, 7), 0.7, u[None])[0]
    shares = torch.bincount(drawn, minlength=7) / 20_000
    torch.testing.assert_close(shares, (logits[0, 0] / 0.7).softmax(-1), atol=1e-4, rtol=0)
    assert int(draw_tokens(logits, 0.0, torch.zeros(1, 1))) == int(logits.argmax())
    barred = torch.tensor([[[-torch.inf, 0.0, 0.0]]])
    assert int(draw_tokens(barred, 1.0, torch.zeros(1, 1))) == 1
