"""The sections of a configuration that every training run has, whatever it trains."""

from dataclasses import dataclass, field
from typing import Literal

from megatext.config import ConfigError
from megatext.data.stream import DataConfig
from megatext.training.engine import Precision
from megatext.training.metrics import LoggingConfig
from megatext.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a step is computed, and how often the run looks at itself."""

    rows_per_step: int = 32
    """Rows of a global batch, over all processes and micro-batches."""
    micro_batch_rows: int = 32
    """Rows in one forward pass of one process; accumulation follows."""
    precision: Precision = "auto"
    """Of weights and activations; master weights, accumulation and reduction are fp32. auto: bf16 where the hardware
    multiplies in it, fp32 elsewhere (a CPU without AVX-512-BF16 or AMX does bf16 hundreds of times slower)."""
    ema_decay: float | None = 0.999
    """Decay of the average of the weights, warmed up from 0.1; None keeps no average."""
    compile: bool = False
    """torch.compile the module; ignored under ZeRO-3 and without a C++ compiler."""
    validation_every_steps: int = 0
    """Steps between validations, each with previews; 0 validates only at the end."""
    validation_batches: int = 1
    """Validation batches of rows_per_step rows, the same ones each time; 0 never validates."""
    keep_last: int = 2
    """Checkpoints kept."""
    skipped_steps_limit: int = 5
    """Steps in a row with non-finite gradients after which the run stops."""

    def __post_init__(self) -> None:
        if self.rows_per_step < 1 or self.micro_batch_rows < 1 or self.keep_last < 1:
            raise ConfigError("training: rows_per_step, micro_batch_rows and keep_last must be at least 1")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError("training.ema_decay must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Launchers extend it by the sections of their recipe."""

    run_dir: str
    """Where the run lives: config.yaml, metrics.jsonl, checkpoints/, samples/."""
    seed: int = 0
    """Of everything random."""
    max_steps: int
    """Optimizer steps of the whole run."""
    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest whole checkpoint of run_dir; never: refuse a run_dir that has one."""
    data: DataConfig
    """Shards and rows."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Batch, precision, EMA, validation."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, metrics.jsonl, wandb."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.save_every_steps < 1:
            raise ConfigError("max_steps and save_every_steps must be at least 1")
