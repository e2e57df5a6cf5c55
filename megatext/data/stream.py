"""The training stream: which windows make up the step that begins at global sample i, and their tokens.

Global sample i is window number permutation(epoch i // n)(i % n) of n. A step takes the longest prefix of the next
samples that packs into its rows, so the step after it, and everything a resumed run needs, follows from i alone.
Plans need lengths only; every rank computes the whole plan and reads its own rows.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates
from megatext.data.order import Permutation
from megatext.data.packing import TokenBatch, pack_prefix
from megatext.data.shards import read_manifest
from megatext.data.tar_index import TarIndex
from megatext.data.windows import WindowIndex


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut."""

    shards: str
    """Directory of token shards, as data_tools.shard writes it."""
    split: str = "train"
    """train, validation or test."""
    row_tokens: int = 1024
    """Tokens in a row of a batch, padding included."""
    max_tokens: int = 1024
    """Longer documents are cut into consecutive windows of this many tokens. At most row_tokens."""
    packed: bool = True
    """Pack several windows into a row; otherwise one window a row."""
    hidden_states: str | None = None
    """Directory of teacher states, as data_tools.extract_hidden_states writes it; null for none."""

    def __post_init__(self) -> None:
        if self.row_tokens < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"data.row_tokens ({self.row_tokens}) and data.max_tokens ({self.max_tokens}) must be positive"
            )
        if self.max_tokens > self.row_tokens:
            raise ConfigError(f"data.max_tokens ({self.max_tokens}) is more than data.row_tokens ({self.row_tokens})")


@dataclass(frozen=True)
class StepPlan:
    """One global step: the samples [first_sample, next_sample), and which row each goes to."""

    first_sample: int
    """Global index of the step's first sample."""
    next_sample: int
    """Where the next step begins: the only state of the stream."""
    rows: list[np.ndarray]
    """For each row of the step the int64 global indices of its samples, ascending. May be empty for a last row."""
    tokens: int
    """Real tokens in all rows, padding not counted."""


class TokenStream:
    """Rows of tokens in an order that is a pure function of (seed, shards); see the module's first lines.

    Raises DataError for missing or damaged shards, and where the split holds less than one step.
    """

    def __init__(self, config: DataConfig, *, seed: int, rows_per_step: int):
        self.config = config
        self.seed = seed
        self.rows_per_step = rows_per_step
        manifest = read_manifest(config.shards)
        if config.split not in manifest["splits"]:
            raise DataError(f"{config.shards}: no split {config.split!r}, only {', '.join(manifest['splits'])}")
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self._shards = []
        for entry in manifest["splits"][config.split]["shards"]:
            shard = TarIndex(Path(config.shards) / entry["file"])
            found = len(shard), int(shard.lengths.sum())
            if found != (entry["samples"], entry["tokens"]):
                raise DataError(
                    f"{shard.path}: holds {found[0]} documents and {found[1]} tokens, but the manifest says "
                    f"{entry['samples']} and {entry['tokens']}; write the shards again"
                )
            self._shards.append(shard)
        lengths = [shard.lengths for shard in self._shards]
        self._first_document = np.cumsum([0] + [len(part) for part in lengths]).tolist()
        self._windows = WindowIndex(lengths, config.max_tokens)
        self.samples_per_epoch = len(self._windows)
        self.tokens_per_epoch = sum(int(part.sum()) for part in lengths)
        self._permutations: dict[int, Permutation] = {}
        self._check_size()
        self._hidden = None
        if config.hidden_states is not None:
            self._hidden = HiddenStates(config.hidden_states)
            self._hidden.check(tokenizer_fingerprint=self.tokenizer_fingerprint, max_tokens=config.max_tokens)

    def _check_size(self) -> None:
        config = self.config
        size = f"{self.samples_per_epoch} windows, {self.tokens_per_epoch} tokens"
        have = f"{config.shards}: split {config.split!r} holds {size}"
        needed = f"one step needs {self.rows_per_step} rows"
        advice = "take a larger corpus, a larger split, or fewer rows per step"
        if self.samples_per_epoch == 0:
            raise DataError(f"{have}; {advice}")
        if config.packed:
            needed += f" of {config.row_tokens} tokens"
            too_small = self.plan(0).next_sample > self.samples_per_epoch
        else:
            needed += " with a window each"
            too_small = self.samples_per_epoch < self.rows_per_step
        if too_small:
            raise DataError(f"{have}, but {needed}: {advice}")

    def _window_of(self, samples: np.ndarray) -> np.ndarray:
        """Window numbers of global samples (int64, any epochs)."""
        epochs = samples // self.samples_per_epoch
        windows = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._permutations:
                if len(self._permutations) > 8:
                    self._permutations.clear()
                self._permutations[epoch] = Permutation(self.samples_per_epoch, self.seed, epoch)
            chosen = epochs == epoch
            windows[chosen] = self._permutations[epoch](samples[chosen] % self.samples_per_epoch)
        return windows

    def plan(self, sample: int) -> StepPlan:
        """The step that begins at global sample `sample`."""
        if not self.config.packed:
            samples = np.arange(sample, sample + self.rows_per_step, dtype=np.int64)
            tokens = int(self._windows.locate(self._window_of(samples)).length.sum())
            return StepPlan(sample, sample + self.rows_per_step, list(samples[:, None]), tokens)
        room = self.rows_per_step * self.config.row_tokens
        count = int(1.2 * room * self.samples_per_epoch / self.tokens_per_epoch) + 16
        while True:
            samples = np.arange(sample, sample + count, dtype=np.int64)
            lengths = self._windows.locate(self._window_of(samples)).length
            if lengths.sum() > room:
                break
            count *= 2
        count, row = pack_prefix(lengths, self.rows_per_step, self.config.row_tokens)
        order = np.argsort(row, kind="stable")
        rows = np.split(sample + order, np.searchsorted(row[order], np.arange(1, self.rows_per_step)))
        return StepPlan(sample, sample + count, rows, int(lengths[:count].sum()))

    def batch(self, plan: StepPlan, rows: slice | list[int]) -> TokenBatch:
        """The chosen rows of a step. Reads only their documents."""
        chosen = plan.rows[rows] if isinstance(rows, slice) else [plan.rows[r] for r in rows]
        shape = (len(chosen), self.config.row_tokens)
        tokens, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        segment = np.full(shape, -1, np.int64)
        documents: list[list[str]] = []
        hidden = valid = None
        if self._hidden is not None:
            hidden = torch.zeros(*shape, self._hidden.width, dtype=torch.bfloat16)
            valid = torch.zeros(shape, dtype=torch.bool)
        ramp = np.arange(self.config.max_tokens)
        windows = self._windows.locate(self._window_of(np.concatenate([np.empty(0, np.int64), *chosen])))
        places = iter(zip(windows.document.tolist(), windows.start.tolist(), windows.length.tolist(), strict=True))
        for r, samples in enumerate(chosen):
            at = 0
            keys = []
            for s, (number, start, length) in enumerate(islice(places, len(samples))):
                shard, document = self._locate(number)
                end = at + length
                tokens[r, at:end] = shard.array(document, start, start + length)
                segment[r, at:end] = s
                position[r, at:end] = ramp[:length]
                keys.append(shard.key(document))
                if self._hidden is not None and hidden is not None and valid is not None:
                    states = self._hidden.read(keys[-1], start, start + length)
                    hidden[r, at : at + len(states)] = states
                    valid[r, at : at + len(states)] = True
                at = end
            documents.append(keys)
        first = [int(samples[0]) if len(samples) else -1 for samples in chosen]
        return TokenBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(segment),
            torch.from_numpy(position),
            torch.tensor(first, dtype=torch.int64),
            documents,
            hidden,
            valid,
        )

    def micro_batches(self, plan: StepPlan, rank: int, count: int, rows: int) -> list[TokenBatch]:
        """A rank's `count` consecutive batches of `rows` rows of a step."""
        first = rank * count * rows
        return [self.batch(plan, slice(start, start + rows)) for start in range(first, first + count * rows, rows)]

    def _locate(self, document: int) -> tuple[TarIndex, int]:
        shard = bisect_right(self._first_document, document) - 1
        return self._shards[shard], document - self._first_document[shard]
