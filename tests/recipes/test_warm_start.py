"""A trunk that starts as a language model computes what the language model computes: transformers is the oracle."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatext.config import ConfigError
from megatext.nn.attention import make_mask
from megatext.nn.blocks import TrunkConfig, initialise
from megatext.nn.dit import TextDiT, TextDiTConfig
from megatext.nn.layout import Layout
from megatext.recipes.pretrained import read_description, weights_hash, write_model
from megatext.recipes.text_dit import TextDiTRecipeConfig
from megatext.recipes.warm_start import load_language_model
from megatext.tokenizer import load_tokenizer
from tests.recipes.test_text_dit import BLOCKS, build_recipe

TRUNK = TrunkConfig(layers=3, width=32, heads=4, mlp_ratio=2.75, mlp="swiglu", norm="rms", initial_gate=1.0)
NETWORK = TextDiTConfig(trunk=TRUNK, output="tokens", token_embedding=True, role_embedding=False, unit_input=False)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """A random Qwen3 model with norms that are not 1, and grouped keys and values."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_directory)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size, head_dim=8, intermediate_size=88, tie_word_embeddings=True, **sizes
    )
    lm = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    directory = tmp_path_factory.mktemp("lm")
    lm.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def make_network(config: TextDiTConfig, vocab_size: int) -> TextDiT:
    network = TextDiT(config, latent_channels=6, vocab_size=vocab_size)
    initialise(network, lambda name, p: torch.randn(p.shape))
    return network


def test_clean_tokens_are_read_as_the_language_model_reads_them(language_model: Path) -> None:
    tokenizer = load_tokenizer(language_model)
    network = make_network(NETWORK, tokenizer.vocab_size)
    load_language_model(network, language_model, tokenizer.fingerprint())
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 11))
    position = torch.arange(11).expand(2, -1)
    layout = Layout.of(torch.zeros_like(tokens), position, block_tokens=1)  # blocks of one token: causal
    arguments = (
        torch.randn(2, 11, 6),
        torch.zeros(1),
        torch.zeros_like(tokens),
        position,
        torch.zeros_like(tokens, dtype=torch.bool),
        make_mask("two_stream", layout),
    )
    with torch.no_grad():
        logits, kept = network(*arguments, tokens=tokens)
        _, only_kept = network(*arguments, tokens=tokens, history=11)
        expected = AutoModelForCausalLM.from_pretrained(language_model)(tokens, use_cache=True)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    for layer, (keys, values) in zip(expected.past_key_values.layers, kept, strict=True):
        torch.testing.assert_close(keys, layer.keys.repeat_interleave(2, dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values.repeat_interleave(2, dim=1), rtol=1e-4, atol=1e-5)
    for whole, part in zip(kept, only_kept, strict=True):
        assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (replace(NETWORK, trunk=replace(TRUNK, layers=2)), "trunk.layers 3, it is 2"),
        (replace(NETWORK, trunk=replace(TRUNK, mlp="gelu")), "trunk.mlp swiglu, it is gelu"),
        (replace(NETWORK, trunk=replace(TRUNK, initial_gate=0.0)), "trunk.initial_gate 1.0, it is 0.0"),
        (replace(NETWORK, unit_input=True), "unit_input False"),
        (replace(NETWORK, token_embedding=False), "token_embedding: true"),
    ],
)
def test_what_does_not_fit_says_what_to_set(language_model: Path, network: TextDiTConfig, message: str) -> None:
    tokenizer = load_tokenizer(language_model)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_language_model(make_network(network, tokenizer.vocab_size), language_model, tokenizer.fingerprint())


def test_another_tokenizer_and_another_folder_are_refused(language_model: Path, tmp_path: Path) -> None:
    network = make_network(NETWORK, load_tokenizer(language_model).vocab_size)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_language_model(network, language_model, "another")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_language_model(network, tmp_path, "another")


def test_a_recipe_starts_from_the_language_model_and_its_export_says_so(language_model: Path, tmp_path: Path) -> None:
    config = TextDiTRecipeConfig(network=NETWORK, flow=BLOCKS, warm_start=str(language_model))
    recipe = build_recipe(tmp_path, language_model, config)
    lm = AutoModelForCausalLM.from_pretrained(language_model).model
    network = recipe.module.network
    assert torch.equal(network.trunk.get_parameter("norm.weight"), lm.norm.weight)
    for number, layer in enumerate(lm.layers):
        name = f"blocks.{number}.mlp.down.weight"
        assert torch.equal(network.trunk.get_parameter(name), layer.mlp.down_proj.weight)
    assert network.token_embedding is not None
    for embedding in (network.token_embedding, network.neighbour_embedding, network.head):
        assert torch.equal(embedding.weight, lm.embed_tokens.weight)
    assert recipe.built_on["dit.warm_start"] == weights_hash(language_model)
    recipe.export(recipe.module.state_dict(), tmp_path / "out")
    assert read_description(tmp_path / "out", "text_dit")["warm_start_hash"] == weights_hash(language_model)


def test_export_remembers_what_it_started_from(language_model: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "out", "text_dit", NETWORK, {}, tokenizer=language_model, warm_start=language_model)
    assert read_description(tmp_path / "out", "text_dit")["warm_start_hash"] == weights_hash(language_model)
    before = weights_hash(language_model)
    changed = tmp_path / "changed"
    shutil.copytree(language_model, changed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(changed)).save_pretrained(changed)
    assert weights_hash(language_model) == before != weights_hash(changed)
