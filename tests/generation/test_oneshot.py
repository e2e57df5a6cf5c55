"""One shot: caches of a prefix, gaps, early exit, traces."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatext.config import ConfigError
from megatext.flow import guidance
from megatext.generation import oneshot
from megatext.generation.noise import Noise, Request
from megatext.generation.text_generator import TextGenerator
from megatext.nn.attention import make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout
from megatext.nn.text_vae import TextVAE
from megatext.recipes.flow_config import FlowConfig
from megatext.recipes.sampling import SamplingConfig
from tests.generation.test_text_generator import LENGTHS, PROMPTS, SYSTEMS, export

GENERATED = {
    "full": FlowConfig(objective="x0", infill_probability=0.3),
    "prefix": FlowConfig(objective="x0", attention="prefix", infill_probability=0.3),
    "prefix_zeros": FlowConfig(
        objective="velocity", attention="prefix", null_condition="zeros", infill_probability=0.3
    ),
    "with_context": FlowConfig(objective="x0", target_encoding="with_context", infill_probability=0.3),
    "null_embedding": FlowConfig(objective="velocity", infill_probability=0.3),
}


@pytest.fixture(params=sorted(GENERATED))
def generator(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> TextGenerator:
    monkeypatch.setitem(SYSTEMS, request.param, (GENERATED[request.param], 2))
    return TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, request.param))


REQUESTS = [
    Request([7, 9, 11, 5, 6, 30, 8], 5, 3),
    Request([7, 9, 11, 5, 6, 30], 4, 4, (0, 1, 2, 7, 8, 9)),
    Request([], 6, 5),
]


def whole_row(request: Request) -> tuple[Tensor, Tensor]:
    """The prompt's tokens where they stand, and which columns are to be written: `[1, columns]`, a column a position,
    as training sees a text."""
    tokens = torch.zeros(1, len(request.prompt) + request.target_tokens, dtype=torch.long)
    given, _ = request.places()
    tokens[0, given] = torch.tensor(request.prompt, dtype=torch.long)
    return tokens, torch.ones_like(tokens, dtype=torch.bool).index_fill(1, torch.tensor(given, dtype=torch.long), False)


def write_without_caches(
    generator: TextGenerator, request: Request, sampling: SamplingConfig
) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """One text, everything computed anew at every step: context and target in one packed row, guidance in a pass of
    its own, plain Euler steps. Returns what the network says of the target at every step, with the context and
    without, and the tokens."""
    network, flow = generator.module.network, generator.flow
    tokens, target = whole_row(request)
    position, columns = torch.arange(tokens.shape[1])[None], target[..., None]
    role = torch.where(target, TARGET, CONTEXT)
    context = generator.latents_of(tokens, Layout.of(torch.where(target, PADDING, 0), position))
    channels = context.shape[-1]
    z = torch.zeros_like(context)
    z[target] = Noise([request], [0], [(0, request.target_tokens)], torch.device("cpu")).normal(channels)[0]
    previous, said, grid = torch.zeros_like(z), [], generator.grid(sampling)

    def predict(t: Tensor, given: bool) -> Tensor:
        dropped = not given and flow.null_condition == "drop"
        segment = torch.where(target | (not dropped), 0, 1)
        return network(
            torch.where(columns, z, context if given or dropped else 0.0),
            torch.stack((torch.zeros(()), t)),
            target.long(),
            position,
            target,
            make_mask(flow.attention, Layout.of(segment, position, role)),
            self_condition=previous,
            alone=target & (not given or not request.prompt),
        )[0]

    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        given, alone = predict(t, True), predict(t, False)
        said.append((given[target], alone[target]))
        predicted = alone + sampling.guidance_scale * (given - alone)
        previous = predicted if flow.objective == "x0" else z - t * predicted
        z = z + (t_next - t) / t * (z - previous)
    written = torch.where(columns, z, context)
    layout = Layout.of(torch.zeros_like(position), position, role)
    decoded = generator.vae.decode(
        generator.vae.unstandardise(written), layout if flow.target_encoding == "with_context" else layout.separated()
    )
    return said, decoded.masked_fill(generator.barred(sampling), -torch.inf).argmax(-1)[target].tolist()


@torch.no_grad()
def test_every_step_is_what_the_whole_row_without_a_cache_gives(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continuation, a gap and a passage from nothing, written together."""
    passes: list[int] = []
    generator.module.network.register_forward_hook(
        lambda module, args, output: passes.append(len(output[0])) if output[0].shape[1] else None
    )
    denoised: list[tuple[Tensor, Tensor]] = []
    combine = guidance.combine

    def note(conditional: Tensor, without: Tensor, scale: float) -> Tensor:
        denoised.append((conditional, without))
        return combine(conditional, without, scale)

    monkeypatch.setattr(guidance, "combine", note)
    sampling = SamplingConfig(steps=4, guidance_scale=2.0)
    (texts,) = generator._pieces(REQUESTS, sampling)
    assert passes == [2 * len(REQUESTS)] * 4
    for row, request in enumerate(REQUESTS):
        said, tokens = write_without_caches(generator, request, sampling)
        for step, found in zip(said, denoised, strict=True):
            for expected, predicted in zip(step, found, strict=True):
                torch.testing.assert_close(predicted[row, : len(tokens)], expected, rtol=1e-3, atol=1e-3)
        assert texts[row] == tokens


@torch.no_grad()
def test_targets_are_encoded_and_decoded_as_in_one_row_of_training(generator: TextGenerator) -> None:
    """What a likelihood encodes, and what every sample is decoded by."""
    vae, together = generator.vae, generator.flow.target_encoding == "with_context"
    assert isinstance(vae, TextVAE)
    writer = oneshot.Writer(generator, REQUESTS)
    ids = torch.randint(5, 200, writer.target.position.shape, generator=torch.Generator().manual_seed(0))
    encoded, decoded = writer.target_latents(ids), writer.logits(writer.target_latents(ids))
    for row, request in enumerate(REQUESTS):
        n, (tokens, target) = request.target_tokens, whole_row(request)
        tokens[target] = ids[row, :n]
        position = torch.arange(tokens.shape[1])[None]
        layout = Layout.of(torch.zeros_like(position), position, torch.where(target, TARGET, CONTEXT))
        seen = layout if together else layout.separated()
        raw = vae.encode(tokens, seen, rule="prefix" if together else None)[0]
        torch.testing.assert_close(encoded[row, :n], vae.standardise(raw)[target], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoded[row, :n], vae.decode(raw, seen)[target], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_call_reads_its_context_once_and_a_prefix_is_in_no_step(
    guidance_scale: float, generator: TextGenerator
) -> None:
    network, vae = generator.module.network, generator.vae
    assert isinstance(vae, TextVAE) and network.timestep is not None
    passes: list[tuple[int, ...]] = []
    calls = {"encoder": 0, "decoder": 0, "timestep": 0}

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[name] += 1

        return add

    network.register_forward_hook(
        lambda module, args, kwargs, output: passes.append((*args[0].shape[:2], kwargs.get("history", 0))),
        with_kwargs=True,
    )
    for name, part in (("encoder", vae.encoder), ("decoder", vae.decoder), ("timestep", network.timestep)):
        part.register_forward_hook(count(name))
    list(generator._pieces(REQUESTS[:2], SamplingConfig(steps=4, guidance_scale=guidance_scale)))
    rows = 2 * (2 if guidance_scale > 1 else 1)
    prefix = generator.flow.attention == "prefix"
    assert passes == ([(4, 7, 7), *[(rows, 5, 0)] * 4] if prefix else [(rows, 12, 0)] * 4)
    assert calls == {"encoder": 1, "decoder": 1, "timestep": 1}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_text_does_not_depend_on_its_neighbours(generator: TextGenerator, guidance_scale: float) -> None:
    for more in (SamplingConfig(), SamplingConfig(solver="dpmpp_2m_sde"), SamplingConfig(exit_margin=0.02)):
        sampling = replace(more, steps=4, guidance_scale=guidance_scale)
        together = generator.generate(PROMPTS, target_tokens=LENGTHS, seeds=[5, 6, 7, 8], sampling=sampling)
        for i in range(4):
            alone = generator.generate([PROMPTS[i]], target_tokens=[LENGTHS[i]], seeds=[5 + i], sampling=sampling)
            assert alone == [together[i]]


def test_a_gap_at_the_end_is_a_continuation(generator: TextGenerator) -> None:
    sampling = SamplingConfig(steps=3)
    (text,) = generator.generate([PROMPTS[0]], target_tokens=[6], seeds=[1], sampling=sampling)
    (whole,) = generator.infill([[PROMPTS[0], 6]], seeds=[1], sampling=sampling)
    ids = generator.tokenizer.encode(PROMPTS[0])
    (row,) = next(iter(generator._pieces([Request(ids, 6, 1)], sampling)))
    assert whole == generator.tokenizer.decode([*ids, *row]) and generator.tokenizer.decode(row) == text


def test_infilling_keeps_what_is_given_and_depends_on_both_sides(generator: TextGenerator) -> None:
    sampling = SamplingConfig(steps=3)
    ends = ["on the mat", "under a tree"]
    predicted: list[torch.Tensor] = []
    hook = generator.module.network.register_forward_hook(lambda module, args, output: predicted.append(output[0]))
    texts = generator.infill(
        [[PROMPTS[0], 5, end] for end in ends] + [[4, "the tree", 2]], seeds=[1, 1, 2], sampling=sampling
    )
    for text, end in zip(texts, ends, strict=False):
        assert text.startswith(PROMPTS[0]) and text.endswith(end)
    assert "the tree" in texts[2]
    hook.remove()
    ends_early = replace(sampling, length="eos")  # means nothing here: what is given stands behind the gap
    assert generator.infill([[PROMPTS[0], 5, ends[0]]], seeds=[1], sampling=ends_early) == texts[:1]
    # the same noise before other ends; as random weights say mostly the same tokens, by what the network says
    assert not torch.allclose(predicted[-1][0, -5:], predicted[-1][1, -5:], atol=1e-3)
    alone = generator.infill([[4, "the tree", 2]], seeds=[2], sampling=sampling)
    assert alone == texts[2:]
    generator.sampling = sampling
    assert generator.infill([[4, "the tree", 2]], seeds=[2]) == alone
    for pieces, message in (([PROMPTS[0]], "without a gap"), ([PROMPTS[0], "", 3], "empty piece")):
        with pytest.raises(ConfigError, match=message):
            generator.infill([pieces], seeds=[0])


@pytest.mark.parametrize(
    ("name", "message"), [("blocks", "one-shot"), ("one_shot_zeros", "infill_probability above 0")]
)
def test_infilling_needs_one_shot_and_to_be_learnt(
    name: str, message: str, tmp_path: Path, tokenizer_directory: Path
) -> None:
    model = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    with pytest.raises(ConfigError, match=message):
        model.infill([["the", 3, "cat"]], seeds=[0])


@pytest.mark.parametrize("name", ["blocks", "cola", "one_shot"])
def test_steps_end_where_every_token_is_sure(name: str, tmp_path: Path, tokenizer_directory: Path) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    calls = 0

    def count(module: object, args: object, output: tuple[torch.Tensor, object]) -> None:
        nonlocal calls
        calls += output[0].shape[1] > 0

    generator.module.network.register_forward_hook(count)
    texts, steps = {}, {}
    for margin in (0.0, 1e-6, 1.0):
        calls = 0
        sampling = SamplingConfig(steps=6, exit_margin=margin)
        texts[margin] = generator.generate([PROMPTS[0]], target_tokens=[4], seeds=[2], sampling=sampling)
        steps[margin] = calls
    blocks = steps[0.0] // 6
    assert steps[1e-6] == blocks and steps[1.0] == steps[0.0]  # at once; never
    assert texts[1.0] == texts[0.0]
    one = SamplingConfig(steps=6)
    first = generator.trace(PROMPTS[0], target_tokens=4, seed=2, sampling=one)[0]
    assert texts[1e-6][0].startswith(first) if name != "one_shot" else texts[1e-6] == [first]
    with pytest.raises(ConfigError, match="exit_margin"):
        generator.generate(["a"], target_tokens=[2], seeds=[0], sampling=SamplingConfig(exit_margin=2.0))


@pytest.mark.parametrize("name", sorted(SYSTEMS))
@pytest.mark.parametrize("tokens", [7, 8, 9])
def test_a_trace_has_a_line_a_step_and_ends_in_the_text(
    name: str, tokens: int, tmp_path: Path, tokenizer_directory: Path
) -> None:
    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, name))
    for solver in ("euler", "heun"):
        sampling = SamplingConfig(steps=5, solver=solver)  # type: ignore[arg-type]
        shown = generator.trace(PROMPTS[0], target_tokens=tokens, seed=3, sampling=sampling)
        assert [shown[-1]] == generator.generate([PROMPTS[0]], target_tokens=[tokens], seeds=[3], sampling=sampling)
        known = len(generator.tokenizer.encode(PROMPTS[0]))
        size = generator.flow.block_tokens
        blocks = -(-(known + tokens) // size) - known // size if size else 1
        assert len(shown) == 5 * blocks and generator.observer is None


def test_a_block_ends_its_steps_when_its_own_text_is_sure(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Columns that the prompt gives, or that lie behind the text's end, are not waited for."""
    from tests.generation.test_text_generator import Prefers

    generator = TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, "blocks"))
    network, calls = generator.module.network, 0
    head = network.head

    class SureInTheMiddle(torch.nn.Module):
        """Certain of the columns that are written, undecided in all others."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros_like(head(x))
            logits[:, 1:3] = Prefers(9)(logits[:, 1:3])
            return logits

    network.head = SureInTheMiddle()  # type: ignore[assignment]
    generator.module.flow = generator.flow = replace(generator.flow, token_likelihood=False)

    def count(module: object, args: object, output: tuple[torch.Tensor, object]) -> None:
        nonlocal calls
        calls += output[0].shape[1] > 0

    network.register_forward_hook(count)
    sampling = SamplingConfig(steps=6, exit_margin=0.9)
    ((text,),) = generator._pieces([Request([5], 2, 0)], sampling)
    assert text == [9, 9] and calls == 1
