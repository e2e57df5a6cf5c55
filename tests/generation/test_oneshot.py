"""One shot: caches of a prefix, gaps, early exit, traces."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatext.config import ConfigError
from megatext.flow import guidance
from megatext.generation.noise import Request
from megatext.generation.text_generator import TextGenerator
from megatext.nn.attention import make_mask
from megatext.nn.layout import CONTEXT, PADDING, TARGET, Layout
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
}


@pytest.fixture(params=sorted(GENERATED))
def generator(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> TextGenerator:
    monkeypatch.setitem(SYSTEMS, request.param, (GENERATED[request.param], 2))
    return TextGenerator.from_pretrained(export(tmp_path, tokenizer_directory, request.param))


def test_every_step_is_what_the_whole_row_without_a_cache_gives(generator: TextGenerator) -> None:
    """As training sees it: context and target in one packed row, once with the context and once without."""
    network, flow = generator.module.network, generator.flow
    prompt = generator.tokenizer.encode(PROMPTS[0])[:7]
    seen: list[torch.Tensor] = []
    keep = network.register_forward_hook(
        lambda module, args, output: seen.append(output[0]) if output[0].shape[1] else None
    )
    denoised: list[tuple[torch.Tensor, torch.Tensor]] = []
    combine = guidance.combine

    def note(conditional: torch.Tensor, without: torch.Tensor, scale: float) -> torch.Tensor:
        denoised.append((conditional, without))
        return combine(conditional, without, scale)

    guidance.combine = note  # type: ignore[assignment]
    try:
        sampling = SamplingConfig(steps=1, guidance_scale=2.0)
        list(generator._pieces([Request(prompt, 5, 3), Request(prompt[:3], 4, 4)], sampling))
    finally:
        guidance.combine = combine
        keep.remove()
    ((conditional, without),) = denoised
    assert len(seen) == 1  # both passes are one
    from megatext.generation.noise import Noise

    noise = Noise([Request(prompt, 5, 3)], [0], [(0, 5)], torch.device("cpu")).normal(6)
    position = torch.arange(12)[None]
    role = torch.where(position < 7, CONTEXT, TARGET)
    tokens = torch.tensor([prompt + [0] * 5])
    context = generator.latents_of(tokens, Layout.of(torch.where(position < 7, 0, PADDING), position))
    target = position >= 7
    z = torch.where(target[..., None], torch.cat((torch.zeros(1, 7, 6), noise), dim=1), context)
    t = torch.tensor([0.0, 1.0])
    for given, found in ((True, conditional), (False, without)):
        dropped = not given and flow.null_condition == "drop"
        segment = torch.where((position < 7) & torch.tensor(dropped), 1, 0)
        layout = Layout.of(segment, position, role)
        row = z if given or dropped else torch.where(target[..., None], z, 0.0)
        out = network(row, t, target.long(), position, target, make_mask(flow.attention, layout))[0]
        torch.testing.assert_close(out[:, 7:], found[:1], rtol=1e-4, atol=1e-4)


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
