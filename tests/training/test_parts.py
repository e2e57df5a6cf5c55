"""The trainer's parts on their own: schedule, Muon, layouts, DeepSpeed's JSON."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatext.config import ConfigError
from megatext.data.stream import DataConfig
from megatext.training.deepspeed_json import deepspeed_json
from megatext.training.engine import Processes, accumulation_steps, chosen_precision
from megatext.training.optimizer import OptimizerConfig, build_optimizer, orthogonalize
from megatext.training.partitions import _contiguous
from megatext.training.run_config import RunConfig, TrainingConfig
from megatext.training.schedule import learning_rate_share

FILES = Path(__file__).resolve().parents[2] / "ds_configs"


def config(**training: object) -> RunConfig:
    options = TrainingConfig(**{"precision": "bf16"} | training)  # type: ignore[arg-type]
    return RunConfig(run_dir="x", max_steps=10, data=DataConfig(shards="x"), training=options)


@given(st.integers(0, 20), st.integers(21, 100), st.sampled_from(["constant", "cosine", "linear"]), st.floats(0, 1))
def test_learning_rate_warms_up_and_decays_to_its_floor(warmup: int, steps: int, schedule: str, floor: float) -> None:
    settings = OptimizerConfig(warmup_steps=warmup, schedule=schedule, min_learning_rate_ratio=floor)  # type: ignore[arg-type]
    shares = [learning_rate_share(settings, step, steps) for step in range(steps + 1)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[:warmup] == sorted(shares[:warmup])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert shares[warmup] == 1.0
    assert shares[-1] == pytest.approx(1.0 if schedule == "constant" else floor)


def test_decay_steps_come_last() -> None:
    settings = OptimizerConfig(schedule="linear", decay_steps=10)
    assert [learning_rate_share(settings, step, 100) for step in (0, 89, 95)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalized_singular_values_are_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    scale = math.sqrt(max(1.0, shape[1] / shape[2]))
    values = torch.linalg.svdvals(result) / scale
    assert values.max() < 1.3
    assert values.median() > 0.6
    # Same singular vectors: the product with the transposed original is symmetric positive.
    product = result @ matrices.mT if shape[1] <= shape[2] else result.mT @ matrices
    torch.testing.assert_close(product, product.mT, rtol=1e-3, atol=1e-3)


def test_muon_gets_the_blocks_matrices_only() -> None:
    module = nn.ModuleDict({"blocks": nn.Linear(4, 4), "embed": nn.Embedding(5, 4)})
    optimizer = build_optimizer(module, OptimizerConfig(name="muon", weight_decay=0.1), muon_dtype=torch.float32)
    groups = {(g["muon"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups}
    assert groups == {(True, 0.1): [(4, 4)], (False, 0.1): [(5, 4)], (False, 0.0): [(4,)]}


def test_learning_rates_of_parts() -> None:
    """A factor on Muon's rate and on AdamW's for what begins with the name, in order; the rest is logged."""
    module = nn.ModuleDict({n: nn.ModuleDict({"blocks": nn.Linear(4, 4)}) for n in ("vae", "dit")})
    settings = OptimizerConfig(
        name="muon", learning_rate=0.1, muon_learning_rate=0.3, learning_rate_scales={"vae.blocks.b": 0.0, "vae": 0.5}
    )
    optimizer = build_optimizer(module, settings, muon_dtype=torch.float32)
    assert optimizer.set_learning_rate(0.5) == 0.05
    names = {id(p): n for n, p in module.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"dit.blocks.weight": 0.15, "dit.blocks.bias": 0.05, "vae.blocks.weight": 0.075, "vae.blocks.bias": 0.0}
    assert rates == pytest.approx(expected)
    with pytest.raises(ConfigError, match="nothing that is trained begins with vea; there are dit, vae;"):
        build_optimizer(module, OptimizerConfig(learning_rate_scales={"vea": 0.5}), muon_dtype=torch.float32)
    with pytest.raises(ConfigError, match="must not be negative"):
        OptimizerConfig(learning_rate_scales={"vae": -0.5})


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 6))
def test_contiguous_layout_covers_every_element_once(sizes: list[int], world: int) -> None:
    params = [nn.Parameter(torch.empty(size)) for size in sizes]
    names = {id(parameter): str(number) for number, parameter in enumerate(params)}
    total = sum(sizes)
    size = math.ceil(total / (2 * world)) * 2
    flat = torch.arange(size * world)
    found = {str(number): torch.full((length,), -1) for number, length in enumerate(sizes)}
    for rank, fragments in enumerate(_contiguous(names, params, size, world)):
        own = flat[rank * size : (rank + 1) * size]
        for f in fragments:
            assert (found[f.name][f.start : f.start + f.length] == -1).all()
            found[f.name][f.start : f.start + f.length] = own[f.offset : f.offset + f.length]
    assert torch.equal(torch.cat(list(found.values())), torch.arange(total))


def test_auto_precision_is_what_the_hardware_has(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, own: found.__setitem__(0, own))
    for amx, avx512, expected in [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert chosen_precision("auto", alone) == expected
        assert (chosen_precision("fp32", alone), chosen_precision("bf16", alone)) == ("fp32", "bf16")


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.glob("*.json")))
def test_shipped_deepspeed_files(name: str) -> None:
    settings = deepspeed_json(config(rows_per_step=32, micro_batch_rows=4), FILES / name, world=2)
    assert settings["train_batch_size"] == 32
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_clipp1ng": 1}, "unknown key 'gradient_clipp1ng'"),
        ({"gradient_clipp1ng": 1}, "did you mean 'gradient_clipping'"),
        (
            {"gradient_clipping": 0.5},
            r"gradient_clipping is 0.5, but the run's config says 1.0 \(optimizer.clip_norm\)",
        ),
        ({"train_batch_size": 64}, r"train_batch_size is 64, but .* says 32 \(training.rows_per_step\)"),
        ({"bf16": {"enabled": False}}, r'bf16 is {"enabled": false}, but .* \(training.precision bf16\)'),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "bf16 is .* remove it here"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set by optimizer.name and its neighbours"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_sise": 5}},
            "did you mean 'zero_optimization.reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memmory": True}}},
            "did you mean 'zero_optimization.offload_param.pin_memory'",
        ),
        ([], "expected an object"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": 0}}, "stage 0 has no fp32 accumulation"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme is not supported"),
    ],
)
def test_deepspeed_files_that_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        deepspeed_json(config(), path, world=1)
    assert str(path) in str(caught.value)


def test_deepspeed_files_may_repeat_what_the_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    same = {"train_batch_size": 32, "gradient_clipping": 1, "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}
    path.write_text(json.dumps(same | {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}))
    assert deepspeed_json(config(), path, world=1)["train_micro_batch_size_per_gpu"] == 32


def test_accumulation_follows_or_is_refused() -> None:
    assert accumulation_steps(config(rows_per_step=24, micro_batch_rows=4), world=2) == 3
    with pytest.raises(ConfigError, match=r"one of \[1, 2, 3, 4, 6, 12\]"):
        accumulation_steps(config(rows_per_step=24, micro_batch_rows=5), world=2)
    with pytest.raises(ConfigError, match="multiple of 5"):
        accumulation_steps(config(rows_per_step=24, micro_batch_rows=1), world=5)


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    """Two runs of several ranks on a machine; one of a single process takes a free port by itself."""
    told = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for world in ("2", "1"):
            environment = os.environ | {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
            code = "from megatext.config import cli_errors\nfrom megatext.training.engine import start_processes\n"
            code += "with cli_errors(): start_processes()"
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            told.append((done.returncode, "deepspeed --master_port N" in done.stderr, "Traceback" in done.stderr))
    assert told == [(1, True, False), (0, False, False)]
