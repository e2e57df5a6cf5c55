"""The presets of the papers' sizes have the papers' numbers of parameters, TextLDM's in units of 2^20."""

from pathlib import Path

import pytest
import torch
import yaml

from megatext.config import from_dict
from megatext.nn.dit import TextDiT
from megatext.nn.text_vae import TextVAE
from megatext.recipes.cola_dlm import PretrainColaConfig
from megatext.recipes.ldlm import PretrainLDLMConfig, make_module
from megatext.recipes.text_dit import PretrainDiTConfig
from megatext.recipes.text_vae import PretrainVAEConfig
from megatext.training.engine import accumulation_steps

PRESETS = Path(__file__).parents[2] / "launch" / "configs" / "textldm"


def parameters(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 2**20


@pytest.mark.parametrize("millions", [350, 502, 690])
def test_text_vae(millions: int) -> None:
    name = PRESETS / f"vae_{millions}m.yaml"
    config = from_dict(PretrainVAEConfig, yaml.safe_load(name.read_text()), where=name.name)
    with torch.device("meta"):
        vae = TextVAE(config.vae.network, PretrainVAEConfig.vocabulary[1])
    assert parameters(vae) == pytest.approx(millions, rel=0.03)
    assert parameters(vae.embedding) + parameters(vae.unembedding) == pytest.approx(223, rel=0.01)


@pytest.mark.parametrize("millions", [114, 328, 768])
def test_text_dit(millions: int) -> None:
    name = PRESETS / f"dit_{millions}m.yaml"
    config = from_dict(PretrainDiTConfig, yaml.safe_load(name.read_text()), where=name.name)
    with torch.device("meta"):
        dit = TextDiT(config.dit.network, latent_channels=64, vocab_size=PretrainDiTConfig.vocabulary[1])
    assert parameters(dit) == pytest.approx(millions, rel=0.03)


def test_cola_dlm() -> None:
    """The release: about 500M and 1.8B, in units of a million, with OLMo 2's 100,278 tokens."""
    given = {name: yaml.safe_load((PRESETS.parent / "cola" / f"{name}.yaml").read_text()) for name in SIZES_OF_COLA}
    vae = from_dict(PretrainVAEConfig, given["vae_500m"], where="vae_500m").vae.network
    dit = from_dict(PretrainColaConfig, given["dit_1800m"], where="dit_1800m").cola.network
    with torch.device("meta"):
        sizes = [parameters(TextVAE(vae, 100_278)), parameters(TextDiT(dit, 16, 100_278))]
    assert [size * 2**20 / 1e6 for size in sizes] == pytest.approx([500, 1800], rel=0.03)
    for name, (kind, section) in SIZES_OF_COLA.items():
        config = from_dict(kind, given[name], where=name)
        assert config.run_dir == f"runs/cola/{name}"
        for ranks in (1,) if "1gpu" in name else (1, 8, 64):  # as launch/slurm/cola.sh starts them
            assert accumulation_steps(config, ranks) >= 1
        if section == "cola":
            assert config.cola.vae == f"runs/cola/models/vae_{'500m' if '1800m' in name else '1gpu'}"


def test_ldlm() -> None:
    """The paper's, in units of a million: two Perceivers of about 50, a token decoder of 66 with its head, a DiT of
    132, some 300 trained; for GPT-2 small's states and tokens."""
    name = PRESETS.parent / "ldlm" / "gpt2.yaml"
    config = from_dict(PretrainLDLMConfig, yaml.safe_load(name.read_text()), where=name.name)
    with torch.device("meta"):
        module = make_module(config.ldlm, 768, PretrainLDLMConfig.vocabulary[1])
    parts = module.autoencoder
    token_decoder = parameters(parts.token_decoder) + parameters(parts.token_in) + parameters(parts.unembedding)
    found = [parameters(parts.encoder), parameters(parts.decoder), token_decoder, parameters(module.denoiser.network)]
    assert [size * 2**20 / 1e6 for size in found] == pytest.approx([50, 50, 66, 132], rel=0.13)
    assert parameters(module) * 2**20 / 1e6 == pytest.approx(300, rel=0.08)


SIZES_OF_COLA = {
    "vae_500m": (PretrainVAEConfig, "vae"),
    "dit_1800m": (PretrainColaConfig, "cola"),
    "vae_1gpu": (PretrainVAEConfig, "vae"),
    "dit_1gpu": (PretrainColaConfig, "cola"),
}
