"""The sections of a configuration that every training run has, whatever it trains."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

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
    ema_decays: tuple[float, ...] = (0.999,)
    """Decays of averages of the weights, warmed up from 0.1, each 4 bytes a parameter over all ranks. The first is used
    for previews and exports, `launch/export.py --ema DECAY` exports another; [] keeps none."""
    compile: bool = False
    """torch.compile the transformer blocks; ignored under ZeRO-3 and without a C++ compiler."""
    validation_every_steps: int = 0
    """Steps between validations, each with previews; 0 validates only at the end."""
    validation_batches: int = 1
    """Validation batches, the same ones each time; 0 never validates."""
    validation_rows: int | None = None
    """Rows of a validation batch; null: rows_per_step. By it, runs of other batches are compared on the same rows."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints of multiples of this step are never deleted; 0 deletes all but the newest."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in the host's memory; a write that fails is a warning then,
    and the next one is waited for. false: training waits."""
    on_non_finite: Literal["skip", "stop"] = "skip"
    """What to do with a step whose gradient is not finite: skip and count it, or stop the run."""
    skipped_steps_limit: int = 5
    """Skipped steps in a row after which the run stops."""
    hang_timeout_seconds: int = 480
    """A process that finishes nothing for so long writes its stacks to run_dir/stacks/ and ends the run; 0 waits for
    ever. Longer than the longest step, validation batch, preview, and what a recipe measures at its end; shorter than
    the ten minutes after which a collective fails by itself (DEEPSPEED_TIMEOUT, NCCL)."""

    def __post_init__(self) -> None:
        if self.rows_per_step < 1 or self.micro_batch_rows < 1 or self.keep_last < 1:
            raise ConfigError("training: rows_per_step, micro_batch_rows and keep_last must be at least 1")
        if self.validation_rows is not None and self.validation_rows < 1:
            raise ConfigError("training.validation_rows must be at least 1")
        if self.keep_every_steps < 0 or self.hang_timeout_seconds < 0 or self.skipped_steps_limit < 1:
            raise ConfigError(
                "training: keep_every_steps and hang_timeout_seconds must be at least 0, skipped_steps_limit at least 1"
            )
        if not all(0.0 < decay < 1.0 for decay in self.ema_decays) or len({*self.ema_decays}) < len(self.ema_decays):
            raise ConfigError("training.ema_decays must lie between 0 and 1 and differ")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Launchers extend it by the sections of their recipe."""

    vocabulary: ClassVar[tuple[str, int]] = ("Qwen3", 151_669)
    """The tokenizer that a dry run presumes where there are no shards yet, and its entries."""
    presumed_model: ClassVar[str] = ""
    """What a dry run takes the model to be that this run builds on, where that is not there yet."""
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
