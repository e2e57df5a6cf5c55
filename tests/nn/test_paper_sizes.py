"""The presets of TextLDM's sizes have the paper's numbers of parameters, counted in units of 2^20."""

from pathlib import Path

import pytest
import torch
import yaml

from megatext.config import from_dict
from megatext.launch import QWEN3_VOCABULARY
from megatext.nn.dit import TextDiT
from megatext.nn.text_vae import TextVAE
from megatext.recipes.text_dit import PretrainDiTConfig
from megatext.recipes.text_vae import PretrainVAEConfig

PRESETS = Path(__file__).parents[2] / "launch" / "configs" / "textldm"


def parameters(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 2**20


@pytest.mark.parametrize("millions", [350, 502, 690])
def test_text_vae(millions: int) -> None:
    name = PRESETS / f"vae_{millions}m.yaml"
    config = from_dict(PretrainVAEConfig, yaml.safe_load(name.read_text()), where=name.name)
    with torch.device("meta"):
        vae = TextVAE(config.vae.network, QWEN3_VOCABULARY)
    assert parameters(vae) == pytest.approx(millions, rel=0.03)
    assert parameters(vae.embedding) + parameters(vae.unembedding) == pytest.approx(223, rel=0.01)


@pytest.mark.parametrize("millions", [114, 328, 768])
def test_text_dit(millions: int) -> None:
    name = PRESETS / f"dit_{millions}m.yaml"
    config = from_dict(PretrainDiTConfig, yaml.safe_load(name.read_text()), where=name.name)
    with torch.device("meta"):
        dit = TextDiT(config.dit.network, latent_channels=64, vocab_size=QWEN3_VOCABULARY)
    assert parameters(dit) == pytest.approx(millions, rel=0.03)
