"""The autoregressive baseline: packing changes nothing, initialisation is reproducible, the export loads elsewhere."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatext.config import save_yaml
from megatext.data import DataError
from megatext.data.packing import TokenBatch
from megatext.data.shards import TOKENIZER_FOLDER
from megatext.data.stream import DataConfig
from megatext.recipes.causal_lm import CausalLMConfig, CausalLMRecipe, PretrainLMConfig
from megatext.training.metrics import LoggingConfig
from megatext.training.run_config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]


def config(shards: Path, **model: object) -> PretrainLMConfig:
    return PretrainLMConfig(
        run_dir="unused",
        max_steps=2,
        data=DataConfig(shards=str(shards), row_tokens=32, max_tokens=32),
        model=CausalLMConfig(width=32, layers=2, heads=2, **model),  # type: ignore[arg-type]
        training=TrainingConfig(rows_per_step=4, micro_batch_rows=2),
        logging=LoggingConfig(log_every_steps=1),
    )


def packed(documents: list[list[int]], row_tokens: int) -> TokenBatch:
    """One row holding the documents one after another."""
    tokens, segment = torch.zeros(1, row_tokens, dtype=torch.long), torch.full((1, row_tokens), -1)
    position, at = torch.zeros(1, row_tokens, dtype=torch.long), 0
    for number, document in enumerate(documents):
        part = slice(at, at + len(document))
        tokens[0, part], segment[0, part] = torch.tensor(document), number
        position[0, part] = torch.arange(len(document))
        at += len(document)
    return TokenBatch(tokens, segment, position, torch.tensor([0]), [["a"]])


def loss(recipe: CausalLMRecipe, batch: TokenBatch) -> tuple[float, int]:
    item = recipe.prepare(batch, step=0)
    with torch.no_grad():
        return float(recipe.module(**item.inputs).loss_sums["cross_entropy"]), int(item.counts["cross_entropy"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_changes_no_loss(shards: Path, attention: str) -> None:
    recipe = CausalLMRecipe(config(shards, attention=attention))
    documents = [[5, 9, 11, 2], [7, 2], [30, 31, 32, 33, 34, 2]]
    together = loss(recipe, packed(documents, 16))
    apart = [loss(recipe, packed([document], 16)) for document in documents]
    assert together[1] == sum(count for _, count in apart) == 3 + 1 + 5
    assert together[0] == pytest.approx(sum(total for total, _ in apart), rel=1e-5)


def test_options_of_computation_change_no_loss(shards: Path) -> None:
    batch = packed([[5, 9, 11, 2], [7, 2]], 16)
    options: list[dict[str, object]] = [
        {"attention": "eager"},
        {"attention": "sdpa"},
        {"logits_chunk_tokens": 5},
        {"activation_checkpointing": 1},
        {"activation_checkpointing": 2},
    ]
    totals = [loss(CausalLMRecipe(config(shards, **option)), batch)[0] for option in options]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-5)


def test_initialisation_depends_on_the_seed_alone(shards: Path) -> None:
    torch.manual_seed(1)
    first = CausalLMRecipe(config(shards)).module.state_dict()
    torch.manual_seed(2)
    again = CausalLMRecipe(config(shards)).module.state_dict()
    other = CausalLMRecipe(dataclasses.replace(config(shards), seed=1)).module.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm.lm_head.weight"], other["lm.lm_head.weight"])


def test_preview_is_text(shards: Path) -> None:
    recipe = CausalLMRecipe(config(shards))
    with torch.no_grad():
        texts = recipe.preview(0, count=2, tokens=5)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data_tools.shard"):
        CausalLMRecipe(config(tmp_path / "nowhere"))


@pytest.mark.dist
def test_trained_by_the_launcher_and_loaded_by_transformers(shards: Path, tmp_path: Path) -> None:
    """`deepspeed --num_gpus 1 launch/pretrain_lm.py`, then launch/export.py, then AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    from megatext.export import export
    from megatext.tokenizer import load_tokenizer

    run, settings = tmp_path / "run", tmp_path / "config.yaml"
    save_yaml(config(shards), settings)
    launcher = Path(sys.executable).with_name("deepspeed")
    result = subprocess.run(
        [launcher, "--num_gpus", "1", "--master_port", "0", "launch/pretrain_lm.py", "--config", settings]
        + ["--run_dir", str(run)],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 2/2 | loss" in result.stdout

    export(run, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").fingerprint() == load_tokenizer(shards / TOKENIZER_FOLDER).fingerprint()
    recipe = CausalLMRecipe(config(shards))
    from megatext.training import checkpoint

    state = checkpoint.Reader(checkpoint.list_checkpoints(run)[-1]).state_dict("ema_0.999")
    recipe.module.load_state_dict(state)
    document = [5, 9, 11, 2]
    with torch.no_grad():
        logits = model(torch.tensor([document])).logits[0].log_softmax(-1)
    expected = -sum(float(logits[i, token]) for i, token in enumerate(document[1:]))
    assert loss(recipe, packed([document], 8))[0] == pytest.approx(expected, rel=1e-4)
