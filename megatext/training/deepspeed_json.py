"""What DeepSpeed is initialised with: a file of ds_configs/, completed from the run's configuration.

The files hold what ZeRO and its communication may be tuned by. Everything else that DeepSpeed must know (batch sizes,
precision, clipping) is taken from the run's configuration, so there is one place to change it. DeepSpeed itself takes a
misspelt key at the top level in silence.
"""

import difflib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatext.config import ConfigError
from megatext.training.engine import accumulation_steps, import_deepspeed
from megatext.training.run_config import RunConfig

FREE_KEYS = (
    "zero_optimization",
    "comms_logger",
    "aio",
    "prescale_gradients",
    "sparse_gradients",
    "communication_data_type",
    "memory_breakdown",
    "timeout",
)
"""Top-level keys that a file of ds_configs/ decides."""
FOREIGN_KEYS = {
    "optimizer": "optimizer.name and its neighbours",
    "scheduler": "optimizer.schedule and its neighbours",
    "steps_per_print": "logging.log_every_steps",
    "wandb": "logging.wandb_project",
    "tensorboard": "logging.wandb_project",
    "activation_checkpointing": "activation_checkpointing of the network",
}
"""Keys that DeepSpeed knows and this trainer does otherwise, with where."""


def free_part(path: Path | None) -> dict[str, Any] | None:
    """What a file says of its own, without what it repeats of a run's configuration: for another batch size."""
    return None if path is None else {key: value for key, value in _read(Path(path)).items() if key in FREE_KEYS}


def deepspeed_json(config: RunConfig, file: Path | dict[str, Any] | None, world: int) -> dict[str, Any]:
    """The settings for `world` processes; `file` None chooses a ZeRO stage. Raises ConfigError where the file has
    unknown keys, contradicts the configuration, or asks for what is not supported."""
    precision, accumulation = config.training.precision, accumulation_steps(config, world)
    assert precision != "auto", "chosen_precision decides it first"
    path = Path(file) if isinstance(file, str | Path) else Path("a dictionary of settings")
    own = {"zero_optimization": {"stage": _default_stage(world, precision)}} if file is None else file
    if not isinstance(own, dict):
        own = _read(path)
    zero = own.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    decided = {
        "train_batch_size": (config.training.rows_per_step, "training.rows_per_step"),
        "train_micro_batch_size_per_gpu": (config.training.micro_batch_rows, "training.micro_batch_rows"),
        "gradient_accumulation_steps": (
            accumulation,
            f"training.rows_per_step / (training.micro_batch_rows x {world} processes)",
        ),
        "gradient_clipping": (config.optimizer.clip_norm, "optimizer.clip_norm"),
        "bf16": ({"enabled": precision == "bf16"}, f"training.precision {precision}"),
        "fp16": ({"enabled": False}, f"training.precision {precision}"),
        "data_types": ({"grad_accum_dtype": "fp32"}, "always so here: gradients are accumulated in fp32"),
        "zero_allow_untested_optimizer": (True, "always so here: the optimizer is megatext's"),
        "zero_force_ds_cpu_optimizer": (False, "always so here: the optimizer is megatext's"),
    }
    if file is not None:
        _check_keys(path, own, decided)
        _check_zero(path, zero, stage, precision)
    settings = own | {key: value for key, (value, _) in decided.items()}
    if stage == 0:
        settings["gradient_clipping"] = 0.0  # the optimizer's own affair there
    settings["communication_data_type"] = own.get("communication_data_type", "fp32")
    settings["steps_per_print"] = sys.maxsize
    return settings


def _default_stage(world: int, precision: str) -> int:
    """On one process there is nothing to shard. Stage 0 copies no gradients into flat buffers, a fifth of a step on
    CPU; stage 1 is the cheapest that keeps fp32 masters of bf16 weights."""
    if world > 1:
        return 3
    return 0 if precision == "fp32" else 1


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config {path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
        raise ConfigError(f"--deepspeed_config {path}: expected an object, with an object as zero_optimization")
    return found


def _check_keys(path: Path, own: dict[str, Any], decided: dict[str, tuple[Any, str]]) -> None:
    for key, value in own.items():
        if key in FOREIGN_KEYS:
            raise ConfigError(f"{path}: '{key}' is set by {FOREIGN_KEYS[key]} of the run's config; remove it here")
        _check_known(path, key, "", [*FREE_KEYS, *decided])
        if key not in decided or value == "auto":
            continue
        wanted, where = decided[key]
        if isinstance(wanted, dict) and isinstance(value, dict):
            agrees = all(k in wanted and v in (wanted[k], "auto") for k, v in value.items())
        else:
            agrees = value == wanted
        if not agrees:
            raise ConfigError(
                f"{path}: {key} is {json.dumps(value)}, but the run's config says {json.dumps(wanted)} ({where}); "
                "change one of the two, or remove it here"
            )


def _check_zero(path: Path, zero: dict[str, Any], stage: Any, precision: str) -> None:
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections: dict[str, Any] = {
        "offload_param": DeepSpeedZeroOffloadParamConfig,
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }
    for key, value in zero.items():
        _check_known(path, key, "zero_optimization.", _fields(DeepSpeedZeroConfig))
        for inner in value if key in sections and isinstance(value, dict) else ():
            _check_known(path, inner, f"zero_optimization.{key}.", _fields(sections[key]))
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}; 0, 1, 2 and 3 exist")
    if stage == 0 and precision == "bf16":
        raise ConfigError(
            f"{path}: zero_optimization.stage 0 has no fp32 accumulation for the bf16 weights of training.precision; "
            "use stage 1, or precision fp32"
        )
    for key in sections:
        if (zero.get(key) or {}).get("device") == "nvme":
            raise ConfigError(f"{path}: zero_optimization.{key} to nvme is not supported; use cpu")
    if zero.get("round_robin_gradients") or zero.get("parameter_alignment"):
        raise ConfigError(f"{path}: round_robin_gradients and parameter_alignment are not supported")


def _check_known(path: Path, key: str, prefix: str, known: Iterable[str]) -> None:
    known = sorted(known)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known are {', '.join(known)}"
        raise ConfigError(f"{path}: unknown key '{prefix}{key}'; {hint}")


def _fields(model: Any) -> list[str]:
    return [name for field, info in model.model_fields.items() for name in (field, info.alias) if name]
