"""What a step costs: FLOPs as estimated against torch's counter on a real step, and no waiting for the device."""

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatext.config import from_dict
from megatext.data.packing import TokenBatch
from megatext.data.stream import TokenStream
from megatext.recipes import build_recipe, config_class, meta_module
from megatext.recipes.base import Recipe
from megatext.recipes.causal_lm import PretrainLMConfig
from megatext.recipes.pretrained import write_model
from megatext.recipes.text_vae import PretrainVAEConfig
from megatext.training.engine import import_deepspeed, start_processes
from megatext.training.estimate import row_flops
from megatext.training.guards import uncompiled
from megatext.training.metrics import Meter
from megatext.training.run_config import RunConfig
from megatext.training.trainer import Trainer, compiled_parts
from tests.processes import REPOSITORY
from tests.recipes.systems import COMMON, KINDS, SYSTEMS, on_vae, write_cola_vae

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
}
"""Operations whose result the host has to wait for."""


@pytest.fixture(scope="module")
def vaes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained VAE for each kind of TextDiT: a token-local one and one with an encoder of two layers."""
    folder, found = tmp_path_factory.mktemp("vaes"), {}
    for system, layers in (("blocks", 0), ("one_shot", 2)):
        own = {"vae": {"network": SYSTEMS["vae"][1]["vae"]["network"]}}
        own["vae"]["network"] = {**own["vae"]["network"], "encoder": {"layers": layers, "width": 32, "heads": 2}}
        own["vae"]["network"]["attention"] = "full"
        config = from_dict(PretrainVAEConfig, given(shards, folder / "run", own), where="test")
        vae = build_recipe(config).module.network
        write_model(folder / system, "text_vae", vae.config, vae.state_dict(), tokenizer=shards / "tokenizer")
        found[system] = str(folder / system)
    write_cola_vae(folder / "vae_cola", shards)
    config = from_dict(PretrainLMConfig, given(shards, folder / "run", SYSTEMS["lm"][1]), where="test")
    recipe = build_recipe(config)
    recipe.export(recipe.module.state_dict(), folder / "vae_lm")
    return found | {"cola": str(folder / "vae"), "ldlm": str(folder / "vae")}


def given(shards: Path, run_dir: Path, own: dict[str, Any]) -> dict[str, Any]:
    data = {"shards": str(shards), "row_tokens": 32, "max_tokens": 32}
    return {"run_dir": str(run_dir), "data": data, **COMMON, **own}


def configuration(name: str, shards: Path, run_dir: Path, vaes: dict[str, str]) -> RunConfig:
    launcher, own = on_vae(name, vaes.get(name, ""))
    return from_dict(config_class(KINDS[launcher]), given(shards, run_dir, own), where="test")


def batch_of(config: RunConfig) -> TokenBatch:
    stream = TokenStream(config.data, seed=0, rows_per_step=config.training.rows_per_step)
    return stream.batch(stream.plan(0), slice(None))


@pytest.mark.parametrize("name", SYSTEMS)
def test_flops_are_those_of_a_step(
    name: str, shards: Path, tmp_path: Path, vaes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's, which stays once ZeRO-3 ran in this process, multiplies more in checkpointed blocks
    monkeypatch.setattr("torch.nn.functional.linear", torch._C._nn.linear)
    config = configuration(name, shards, tmp_path, vaes)
    recipe = build_recipe(config)
    recipe.module.train()
    batch = batch_of(config)
    share = getattr(getattr(recipe, "flow", None), "self_conditioning_probability", 0.0)
    executed = 0.0
    for twice, weight in ((False, 1 - share), (True, share)):
        if weight == 0:
            continue
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's own is not counted
            inputs = recipe.prepare(batch, step=0).inputs
            if "self_condition" in inputs:
                inputs["self_condition"] = twice
            torch.stack(list(recipe.module(**inputs).loss_sums.values())).sum().backward()
        executed += weight * counter.get_total_flops()
    vocab_size = recipe.vae.vocab_size if hasattr(recipe, "vae") else 300
    found = row_flops(config, meta_module(config, vocab_size), vocab_size)
    assert found.total * len(batch.tokens) == pytest.approx(executed, rel=0.02)
    assert (found.frozen > 0) == (name not in ("lm", "vae"))
    assert found.recomputed > 0


def test_flops_are_the_same_once_zero_3_has_begun(
    shards: Path, tmp_path: Path, vaes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration("lm", shards, tmp_path, vaes)
    found = row_flops(config, meta_module(config, 300), 300)
    monkeypatch.setattr("torch.nn.functional.linear", import_deepspeed().runtime.zero.linear.zero3_linear_wrap)
    assert row_flops(config, meta_module(config, 300), 300) == found


def test_recomputation_is_not_the_models(shards: Path, tmp_path: Path, vaes: dict[str, str]) -> None:
    """Checkpointing no, every second, every layer: the same model, and more recomputation."""
    config = configuration("lm", shards, tmp_path, vaes)
    found = []
    for every in (0, 2, 1):
        model = dataclasses.replace(config.model, activation_checkpointing=every)  # type: ignore[attr-defined]
        changed = dataclasses.replace(config, model=model)  # type: ignore[call-arg]
        found.append(row_flops(changed, meta_module(changed, 300), 300))
    assert found[0].model == found[1].model == found[2].model
    assert 0 == found[0].recomputed < found[1].recomputed < found[2].recomputed < found[0].model / 3
    assert found[1].recomputed == pytest.approx(found[2].recomputed * 2 / 3)  # 2 of its 3 layers


class _Waits(TorchDispatchMode):
    """Notes where megatext makes the host wait for a result, as torch's own code and DeepSpeed's do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or by_mask:
            ours = ("/torch/", "test_step_cost")
            caller = [f for f in traceback.extract_stack() if not any(part in f.filename for part in ours)][-1]
            if caller.filename.startswith(str(REPOSITORY / "megatext")):
                self.places.append(f"{caller.filename}:{caller.lineno} {caller.name} {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_does_not_wait_for_the_device(name: str, shards: Path, tmp_path: Path, vaes: dict[str, str]) -> None:
    """Preparing, forward, backward, guard, average: no scalar is read and no shape depends on data, except that the
    vote on stopping, which lies in the host's memory, is looked at."""
    config = configuration(name, shards, tmp_path / "run", vaes)
    trainer = Trainer(config, build_recipe(config), REPOSITORY / "ds_configs" / "zero1.json", start_processes())
    for _ in range(2):
        batches, plan = trainer._load(trainer.state.sample)
        trainer.state.sample = plan.next_sample
        with _Waits() as waits:
            trainer.train_step(batches, Meter())
        assert [place for place in waits.places if "_votes_to_stop" not in place] == []
        assert any("_votes_to_stop" in place for place in waits.places)


@pytest.mark.parametrize("name", SYSTEMS)
def test_compiled_blocks_compute_the_same(name: str, shards: Path, tmp_path: Path, vaes: dict[str, str]) -> None:
    """Every block of every recipe is compiled (traced, not turned into machine code, which takes a minute), and few
    enough variants of it for torch to keep them all; and `uncompiled` runs none of it."""
    config = configuration(name, shards, tmp_path, vaes)
    recipe, batch = build_recipe(config), batch_of(config)

    def gradients(step: int) -> list[torch.Tensor]:
        item = recipe.prepare(batch, step=step)
        recipe.module.zero_grad()
        torch.stack(list(recipe.module(**item.inputs).loss_sums.values())).sum().backward()
        return [p.grad for p in recipe.module.parameters() if p.grad is not None]

    steps = range(4)  # with and without self-conditioning
    plain = [[g.clone() for g in gradients(step)] for step in steps]
    parts = compiled_parts(recipe.module)
    assert parts == [m for m in recipe.module.modules() if type(m).__name__ in ("Block", "Qwen3DecoderLayer")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for part in parts:
            part.compile(dynamic=False, backend="aot_eager")
        for step in steps:
            for mine, theirs in zip(gradients(step), plain[step], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    traced = torch._dynamo.utils.counters["frames"]["ok"]
    assert traced > 0
    torch._dynamo.reset()
    with uncompiled(recipe.module):
        gradients(0)
    assert torch._dynamo.utils.counters["frames"]["ok"] == traced
    assert all(part._compiled_call_impl is not None for part in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_does_not_wait_for_the_gpu(name: str, shards: Path, tmp_path: Path, vaes: dict[str, str]) -> None:
    """torch itself raises where the host would wait for the GPU."""
    config, device = configuration(name, shards, tmp_path, vaes), torch.device("cuda")
    recipe: Recipe = build_recipe(config)
    recipe.module.to(device)
    recipe.to(device, torch.float32)
    batch = batch_of(config)
    for step in range(3):  # the first may compile and allocate
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            item = recipe.prepare(batch.pinned().to(device), step=step)
            torch.stack(list(recipe.module(**item.inputs).loss_sums.values())).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_flops_of_the_largest_preset_are_those_of_a_formula(tmp_path: Path) -> None:
    """Counted without memory for its weights."""
    path = REPOSITORY / "launch/configs/textldm/dit_768m.yaml"
    config = from_dict(config_class("PretrainDiTConfig"), yaml.safe_load(path.read_text()), where=str(path))
    module = meta_module(config, 151_669)
    assert all(p.is_meta for p in module.parameters())
    flops = row_flops(config, module, 151_669)
    # 6 a parameter and token, and 12 x width x row tokens a layer for attention
    weights = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
    assert flops.model / 1024 == pytest.approx(6 * weights + 12 * 1280 * 1024 * 41, rel=0.01)
