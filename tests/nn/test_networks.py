"""Attention, RoPE, blocks and networks against plain references."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch

from megatext.nn.attention import KVCache, Mask, attend, make_mask
from megatext.nn.blocks import (
    MLP,
    Attention,
    Block,
    TimestepEmbedding,
    Trunk,
    TrunkConfig,
    apply_rope,
    initialise,
    rope_tables,
)
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import CONTEXT, TARGET, Layout
from megatext.nn.text_vae import TextVAE, TextVAEConfig

SMALL = TrunkConfig(layers=2, width=16, heads=2)


def random_layout(rows: int = 2, tokens: int = 12, block_tokens: int = 4) -> Layout:
    """Two segments and some padding a row."""
    cut, end = tokens // 2, tokens - 2
    segment = torch.tensor([0] * cut + [1] * (end - cut) + [-1] * (tokens - end)).expand(rows, tokens)
    position = torch.tensor([*range(cut), *range(end - cut), *[0] * (tokens - end)]).expand(rows, tokens)
    return Layout.of(segment, position, block_tokens=block_tokens)


def fill(module: torch.nn.Module) -> None:
    """Random values everywhere, heads and modulations too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("rule", ["full", "causal", "block_causal"])
def test_dense_attention_equals_a_loop(rule: str) -> None:
    layout = random_layout()
    q, k, v = torch.randn(3, 2, 2, 12, 8).unbind()
    mask = make_mask(rule, layout, backend="dense")
    out = attend(q, k, v, mask)
    for r in range(2):
        for h in range(2):
            for i in range(12):
                seen = [j for j in range(12) if mask.dense[r, 0, i, j]]
                weights = [math.exp(float(q[r, h, i] @ k[r, h, j]) / math.sqrt(8)) for j in seen]
                expected = sum(w * v[r, h, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
                torch.testing.assert_close(out[r, h, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["full", "prefix", "causal", "block_causal", "two_stream"])
def test_flex_equals_dense(rule: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    clean = random_layout(tokens=16)
    layout = Layout.concatenate([clean, clean.with_role(TARGET)])
    q, k, v = torch.randn(3, 2, 2, 32, 16).unbind()
    flex = make_mask(rule, layout, backend="flex")
    dense = attend(q, k, v, make_mask(rule, layout, backend="dense"))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex.block), dense, rtol=1e-4, atol=1e-5)


def test_rope_is_a_rotation_by_position() -> None:
    position = torch.tensor([[0, 3, 7]])
    x = torch.randn(1, 1, 3, 8)
    rotated = apply_rope(x, *rope_tables(position, 8, 100.0))
    for column, p in enumerate(position[0].tolist()):
        for i in range(4):
            angle = p * 100.0 ** (-2 * i / 8)
            a, b = float(x[0, 0, column, i]), float(x[0, 0, column, i + 4])
            assert float(rotated[0, 0, column, i]) == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert float(rotated[0, 0, column, i + 4]) == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5
            )


def test_attention_depends_on_relative_positions_only() -> None:
    block = Block(SMALL)
    fill(block)
    x, layout = torch.randn(1, 6, 16), random_layout(rows=1, tokens=6)
    mask = make_mask("full", Layout.of(torch.zeros(1, 6, dtype=torch.long), layout.position), backend="dense")
    outs = [block(x, rope_tables(torch.arange(6)[None] + shift, 8, 10_000.0), mask)[0] for shift in (0, 50)]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)


def test_gathered_modulation_equals_per_token_modulation() -> None:
    block = Block(SMALL, conditioned=True)
    fill(block)
    x, embedding = torch.randn(2, 5, 16), torch.randn(3, 16)
    index = torch.tensor([[0, 1, 2, 2, 1], [2, 0, 0, 1, 2]])
    rope, mask = rope_tables(torch.arange(5).expand(2, 5), 8, 100.0), Mask()
    each = torch.arange(10).view(2, 5)
    gathered = block(x, rope, mask, (block.modulate(embedding), index))[0]
    torch.testing.assert_close(gathered, block(x, rope, mask, (block.modulate(embedding[index.flatten()]), each))[0])


def test_adaln_zero_starts_as_the_identity() -> None:
    trunk = Trunk(SMALL, conditioned=True)
    initialise(trunk, lambda name, p: torch.randn(p.shape))
    x, index = torch.randn(1, 4, 16), torch.zeros(1, 4, dtype=torch.long)
    tables = [block.modulate(torch.randn(1, 16)) for block in trunk.blocks]
    out, _ = trunk(x, torch.arange(4)[None], Mask(), (tables, index))
    torch.testing.assert_close(out, trunk.norm(x))


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(every: int) -> None:
    layout, x = random_layout(), torch.randn(2, 12, 16)
    results = []
    for n in (0, every):
        trunk = Trunk(TrunkConfig(layers=3, width=16, heads=2, activation_checkpointing=n))
        fill(trunk)
        loss = trunk(x, layout.position, make_mask("causal", layout))[0].square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trunk.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_activation_checkpointing_computes_every_nth_block_again(every: int, expected: list[int]) -> None:
    trunk = Trunk(replace(SMALL, layers=5, activation_checkpointing=every))
    computed: list[int] = []
    for number, block in enumerate(trunk.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: computed.append(number))
    out, _ = trunk(torch.randn(1, 4, 16), torch.arange(4)[None], Mask())
    assert computed == [0, 1, 2, 3, 4]
    computed.clear()
    out.sum().backward()
    assert sorted(computed) == expected


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return value * gate / (1 + (-gate).exp())


@pytest.mark.parametrize(
    ("mlp", "function"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("swiglu", swiglu),
    ],
)
def test_the_mlp_is_two_matrices_around_the_function_it_names(
    mlp: Literal["gelu", "gelu_tanh", "swiglu"], function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    module = MLP(replace(SMALL, mlp=mlp)).double()
    fill(module)
    x = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = function(x @ module.up.weight.T) @ module.down.weight.T
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)  # the two GELUs differ by 1e-4


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_norm_adds_norm_eps_to_the_variance(norm: Literal["layer", "rms"]) -> None:
    trunk = Trunk(replace(SMALL, norm=norm, qk_norm_kind=norm, norm_eps=1e-2))
    norms = [part for part in trunk.modules() if isinstance(part, torch.nn.LayerNorm | torch.nn.RMSNorm)]
    assert len(norms) == 2 * 4 + 1
    for part in norms:
        x = 0.1 * torch.randn(3, *part.normalized_shape)
        x = x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(part(x), x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt())


@pytest.mark.parametrize("part", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer_all_heads", None])
def test_the_scale_of_queries_and_keys_matters_only_without_qk_norm(
    kind: Literal["rms", "layer", "layer_all_heads"] | None, part: int
) -> None:
    config = SMALL if kind is None else replace(SMALL, qk_norm_kind=kind)
    attention = Attention(replace(config, qk_norm=kind is not None))
    torch.nn.init.normal_(attention.qkv.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    rope = rope_tables(torch.arange(6)[None], 8, 100.0)
    before = attention(x, rope, Mask())[0]
    with torch.no_grad():
        attention.qkv.weight[16 * part : 16 * (part + 1)] *= 3.0
    same = torch.allclose(attention(x, rope, Mask())[0], before, rtol=1e-3, atol=1e-4)
    assert same == (kind is not None)


def test_timestep_embedding_distinguishes_neighbours() -> None:
    embedding = TimestepEmbedding(16)
    out = embedding(torch.tensor([0.0, 0.001, 0.5, 1.0]))
    assert out.shape == (4, 16) and torch.pdist(out).min() > 1e-4


def columns(layout: Layout, part: slice) -> Layout:
    """The layout of some of the columns."""
    return Layout(*(x[:, part] for x in (layout.segment, layout.position, layout.role, layout.block)))


def test_cached_blocks_equal_one_pass() -> None:
    """History in a cache, block by block, gives what one two-stream row gives."""
    size, tokens = 4, 12
    network = TextDiT(TextDiTConfig(trunk=SMALL), latent_channels=3, vocab_size=7)
    fill(network)
    position = torch.arange(tokens)[None]
    clean = Layout.of(torch.zeros_like(position), position, block_tokens=size)
    both = Layout.concatenate([clean, clean.with_role(TARGET)])
    x0, noisy = torch.randn(2, 1, tokens, 3).unbind()
    t = torch.tensor([0.0, 0.7])
    index = torch.cat((torch.zeros_like(position), torch.ones_like(position)), dim=1)
    whole, _ = network(
        torch.cat((x0, noisy), 1), t, index, both.position, both.role != CONTEXT, make_mask("two_stream", both)
    )
    cache = KVCache(2, 1, 2, tokens, 8, dtype=torch.float32, device="cpu")
    slots = Layout.of(torch.full_like(position, -2), position, block_tokens=size)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        slots.segment[:, :start] = 0
        for role, values in ((TARGET, noisy), (CONTEXT, x0)):
            own = columns(clean, part).with_role(role)
            mask = make_mask("two_stream", own, Layout.concatenate([slots, own]))
            out, kept = network(
                values[:, part],
                t,
                torch.full_like(own.position, int(role != CONTEXT)),
                own.position,
                own.role != CONTEXT,
                mask,
                past=cache.of(torch.tensor([0]), tokens),
            )
            if role == TARGET:
                torch.testing.assert_close(out, whole[:, tokens:][:, part], rtol=1e-4, atol=1e-5)
            else:
                cache.write(kept, torch.tensor([0]), own.position)


def test_token_local_latents_depend_on_the_token_alone() -> None:
    config = TextVAEConfig(latent_channels=5, encoder=TrunkConfig(layers=0, width=16, heads=2), decoder=SMALL)
    vae = TextVAE(config, vocab_size=11)
    fill(vae)
    tokens, layout = torch.randint(0, 11, (2, 12)), random_layout()
    mean, _, _ = vae.encode(tokens, layout)
    torch.testing.assert_close(vae.standardise(mean), vae.token_table()[tokens])


@pytest.mark.parametrize(
    ("rule", "encoder_layers", "moved_means", "moved_logits"),
    [
        ("full", 2, range(8), range(8)),
        ("causal", 2, [7], [7]),
        ("block_causal", 2, [6, 7], [6, 7]),
        ("full", 0, [7], range(8)),
        ("causal", 0, [7], [7]),
    ],
)
def test_what_the_last_token_moves_under_each_rule(
    rule: Literal["full", "causal", "block_causal"],
    encoder_layers: int,
    moved_means: Sequence[int],
    moved_logits: Sequence[int],
) -> None:
    config = TextVAEConfig(5, replace(SMALL, layers=encoder_layers), SMALL, attention=rule, block_tokens=3)
    vae = TextVAE(config, vocab_size=11)
    fill(vae)
    layout = vae.layout(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None])
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[0, -1] = 10
    mean, changed = vae.encode(tokens, layout)[0], vae.encode(other, layout)[0]
    assert (mean != changed).any(-1)[0].nonzero().flatten().tolist() == list(moved_means)
    changed = torch.cat((mean[:, :-1], -mean[:, -1:]), dim=1)
    logits, changed = vae.decode(mean, layout), vae.decode(changed, layout)
    assert (logits != changed).any(-1)[0].nonzero().flatten().tolist() == list(moved_logits)


@pytest.mark.parametrize("initial_log_variance", [-4.0, 1.5])
@pytest.mark.parametrize("latent_norm", ["none", "layer"])
def test_the_posterior_is_what_its_head_gives_with_norm_and_bias(
    latent_norm: Literal["none", "layer"], initial_log_variance: float
) -> None:
    config = TextVAEConfig(5, SMALL, SMALL, latent_norm=latent_norm, initial_log_variance=initial_log_variance)
    vae = TextVAE(config, vocab_size=11)
    fill(vae)
    mean, log_variance, features = vae.encode(torch.randint(0, 11, (2, 12)), random_layout())
    raw, head = vae.posterior(features).chunk(2, dim=-1)
    torch.testing.assert_close(log_variance, head + initial_log_variance)
    expected = raw if latent_norm == "none" else (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, False, keepdim=True)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)
    scales = mean.square().mean(-1)
    assert torch.allclose(scales, torch.ones(2, 12), atol=1e-3) == (latent_norm == "layer")


def test_layer_norm_fixes_the_scale_of_latents() -> None:
    vae = TextVAE(TextVAEConfig(latent_channels=8, encoder=SMALL, decoder=SMALL), vocab_size=11)
    fill(vae)
    mean, _, _ = vae.encode(torch.randint(0, 11, (2, 12)), random_layout())
    torch.testing.assert_close(mean.square().mean(-1), torch.ones(2, 12), rtol=1e-3, atol=1e-3)


def test_padding_and_other_segments_do_not_matter() -> None:
    vae = TextVAE(TextVAEConfig(encoder=SMALL, decoder=SMALL), vocab_size=11)
    fill(vae)
    layout, tokens = random_layout(), torch.randint(0, 11, (2, 12))
    changed = torch.where(layout.segment == 0, tokens, (tokens + 1) % 11)
    for a, b in zip(vae.encode(tokens, layout)[:2], vae.encode(changed, layout)[:2], strict=True):
        assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize(("unit_input", "variance"), [(True, 1.0), (False, 1 / 64)])
def test_the_variance_of_what_enters_the_first_block(unit_input: bool, variance: float) -> None:
    """Latents of variance 1 and embeddings of tokens alike, at initialisation and a width of 64."""
    torch.manual_seed(0)
    trunk = replace(SMALL, width=64)
    config = TextDiTConfig(
        trunk=trunk, unit_input=unit_input, role_embedding=False, token_embedding=True, output="tokens"
    )
    network = TextDiT(config, latent_channels=32, vocab_size=500)
    initialise(network, lambda name, parameter: torch.randn_like(parameter))
    entered: list[torch.Tensor] = []
    network.trunk.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    rows = torch.zeros(1, 400, dtype=torch.long)
    layout = Layout.of(rows, torch.arange(400)[None])
    network(
        torch.randn(1, 400, 32),
        torch.tensor([0.5]),
        rows,
        layout.position,
        rows.bool(),
        make_mask("full", layout),
        history=0,
        tokens=torch.randint(0, 500, (1, 200)),
    )
    for half in entered[0].detach().chunk(2, dim=1):
        assert float(half.square().mean()) == pytest.approx(variance, rel=0.15)
