"""Systems: anything that writes a continuation. Checkpoints, Hugging Face models, files, and the sanity rows."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evaluation.files import read_yaml
from evaluation.hub import model_directory
from evaluation.manifest import Manifest
from evaluation.systems.base import System
from evaluation.systems.sanity import SANITY, Generations, SanityRow
from megatext.config import ConfigError, from_dict


@dataclass(frozen=True)
class SystemEntry:
    """One row of the table, as the systems file has it."""

    name: str
    """Name of the row; unique."""
    system: str
    """`model:DIR` (exported by megatext), `hf:DIR or name`, `jsonl:FILE`, `python:MODULE:FUNCTION`, or a sanity row:
    human, other, shuffled, repeat, empty."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keys of SamplingConfig for a diffusion model (none: as the model's own description says), of CausalSampling for a
    causal LM; a function's keywords."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the model's weights and activations."""
    group: str = ""
    """Rows of one group and the same sampling are seeds of one system: the report has their means and deviations, and
    joins a group's ways of sampling in its plot of quality against variety."""
    batch_size: int = 100
    """Texts written at once; a text does not depend on its neighbours but for rounding."""
    trace: int = 0
    """Of how many of the first samples the report shows what was to be read after every step (diffusion models)."""
    likelihood: int = 0
    """Of how many of the first samples the target's likelihood is told: exact for a causal LM, a bound for a diffusion
    model."""
    likelihood_by: dict[str, Any] = field(default_factory=dict)
    """How that bound is estimated: keys of LikelihoodConfig (estimator, seeds, steps, smallest_timestep)."""
    unconditional: int = 0
    """Passages to write without a prefix; scored by nll, entropy and distinct-2 only."""
    unconditional_tokens: int | None = None
    """Their length in the system's tokens; None: as long as the task's documents may be."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.unconditional, self.trace, self.likelihood) < 0:
            raise ConfigError(f"system {self.name}: needs batch_size >= 1, no other number of texts below 0")
        if self.unconditional and self.system.partition(":")[0] not in ("hf", "model", "python"):
            raise ConfigError(f"system {self.name}: {self.system} writes no passages without a prefix")
        if self.likelihood_by and not self.likelihood:
            raise ConfigError(f"system {self.name}: likelihood_by says how, likelihood of how many texts; set it too")


def load_systems(path: Path) -> list[SystemEntry]:
    """Read a systems file: a YAML list of entries."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such systems file")
    data = read_yaml(path)
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ConfigError(f"{path}: expected a list of entries with the keys name and system")
    return [from_dict(SystemEntry, item, where=f"{path}, entry {i + 1}") for i, item in enumerate(data)]


def complete(entries: Sequence[SystemEntry], judge: Path | None) -> list[SystemEntry]:
    """Check names, and put first the rows that others are measured against: human, and with a judge shuffled."""
    present = {entry.system for entry in entries}
    rows = ("human", "shuffled") if judge else ("human",)
    whole = [SystemEntry(row, row) for row in rows if row not in present] + list(entries)
    names = [entry.name for entry in whole]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"system {name}: two rows have this name ({', '.join(rows)} are always there)")
    return whole


def open_system(entry: SystemEntry, manifest: Manifest, *, judge: Path | None = None, device: str = "cpu") -> System:
    """Make an entry ready. Reads no weights before the first text, so that a cached system costs their hash only."""
    system = _opened(entry, manifest, judge, device)
    if entry.likelihood_by:
        system.check_likelihood(entry.likelihood_by, f"system {entry.name}, likelihood_by")
    return system


def _opened(entry: SystemEntry, manifest: Manifest, judge: Path | None, device: str) -> System:
    kind, _, rest = entry.system.partition(":")
    if entry.system in SANITY:
        return SanityRow(entry.system, manifest, judge)
    if kind == "jsonl":
        return Generations(Path(rest), manifest)
    if kind in ("hf", "model"):
        directory = model_directory(rest, f"system {entry.name}: {kind}:")
        return open_model(directory, entry.sampling, name=entry.name, dtype=entry.dtype, device=device)
    if kind == "python":
        return _python(rest, entry)
    raise ConfigError(
        f"system {entry.name}: unknown system {entry.system!r}; write model:DIR, hf:DIR, jsonl:FILE, "
        f"python:MODULE:FUNCTION or one of {', '.join(SANITY)}"
    )


def open_model(directory: Path, sampling: dict[str, Any], *, name: str, dtype: str, device: str) -> System:
    """The system of a model directory, by what its config.json says it is."""
    from evaluation.systems.exported import Reconstruction, TextDiffusion, kind_of

    where = f"system {name}, sampling"
    kind = kind_of(directory)
    if kind == "text_vae":
        if sampling:
            raise ConfigError(f"{where}: a TextVAE reconstructs the target and is not sampled; leave it out")
        return Reconstruction(directory, device)
    if kind is not None:
        return TextDiffusion(directory, sampling, where=where, dtype=dtype, device=device)
    from evaluation.systems.causal_lm import CausalLM, CausalSampling

    return CausalLM(directory, from_dict(CausalSampling, sampling, where=where), dtype=dtype, device=device)


def _python(rest: str, entry: SystemEntry) -> System:
    module, _, function = rest.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"system {entry.name}: python:{rest}: {error}; write python:MODULE:FUNCTION") from None
    system = make(**entry.sampling)
    if not isinstance(system, System):
        raise ConfigError(f"system {entry.name}: {rest} returned {type(system).__name__}, not an evaluation System")
    return system
