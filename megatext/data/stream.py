"""The training stream: which windows make up the step that begins at global sample i, and their tokens.

Global sample i belongs to a source and a position in it (megatext.data.mixture), the position to a window
(megatext.data.source). A step takes the longest prefix of the next samples that packs into its rows, so the step after
it, and everything a resumed run needs, follows from i alone. Plans need lengths only; every rank computes the whole
plan and reads its own rows.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.data.mixture import Mixture, counts_of
from megatext.data.packing import TokenBatch, pack_prefix
from megatext.data.remote import is_remote
from megatext.data.source import WindowSource
from megatext.data.windows import Windows


@dataclass(frozen=True)
class SourceConfig:
    """A further source, read in turns with the first."""

    shards: str
    """As data.shards."""
    weight: float = 1.0
    """As data.weight."""
    hidden_states: str | None = None
    """As data.hidden_states."""


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut."""

    shards: str
    """Directory of token shards, as data_tools.shard writes it; or where to fetch it from: https://..., s3://..., or
    pipe:command with {} for the name of a file."""
    weight: float = 1.0
    """Share of the tokens, relative to the weights of more_sources."""
    hidden_states: str | None = None
    """Directory of teacher states, as data_tools.extract_hidden_states writes it; null for none. May be remote too."""
    more_sources: tuple[SourceConfig, ...] = ()
    """Further shard directories, made with the same tokenizer."""
    split: str = "train"
    """train, validation or test."""
    row_tokens: int = 1024
    """Tokens in a row of a batch, padding included."""
    max_tokens: int = 1024
    """Longer documents are cut into consecutive windows of this many tokens. At most row_tokens."""
    packed: bool = True
    """Pack several windows into a row; otherwise one window a row."""

    def __post_init__(self) -> None:
        if self.row_tokens < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"data.row_tokens ({self.row_tokens}) and data.max_tokens ({self.max_tokens}) must be positive"
            )
        if self.max_tokens > self.row_tokens:
            raise ConfigError(f"data.max_tokens ({self.max_tokens}) is more than data.row_tokens ({self.row_tokens})")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise ConfigError(f"data: the weight of {source.shards} is {source.weight}; it must be positive")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All of them, the first one too."""
        return (SourceConfig(self.shards, self.weight, self.hidden_states), *self.more_sources)

    def folders(self) -> list[str]:
        """The shard directories that must be on this machine."""
        return [source.shards for source in self.sources if not is_remote(source.shards)]

    def states(self) -> list[str]:
        """The places of teacher states, of the sources that have some."""
        return [source.hidden_states for source in self.sources if source.hidden_states is not None]


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
    """Rows of tokens in an order that is a pure function of (seed, shards, weights); see the module's first lines.

    Raises DataError for missing or damaged shards, sources that do not go together, and where the split holds less
    than one step.
    """

    def __init__(self, config: DataConfig, *, seed: int, rows_per_step: int):
        self.config = config
        self.rows_per_step = rows_per_step
        self.sources = [
            WindowSource(s.shards, config.split, max_tokens=config.max_tokens, hidden_states=s.hidden_states, seed=seed)
            for s in config.sources
        ]
        first = self.sources[0]
        self.tokenizer_fingerprint = first.tokenizer_fingerprint
        for other in self.sources[1:]:
            if other.tokenizer_fingerprint != self.tokenizer_fingerprint:
                raise DataError(f"{other.name}: made with another tokenizer than {first.name}; shard one of them again")
        widths = {source.hidden.width for source in self.sources if source.hidden is not None}
        if len(widths) > 1:
            raise DataError(f"data: the teacher states of the sources have different widths, {sorted(widths)}")
        self._hidden_width = widths.pop() if widths else None
        # weights are shares of tokens, counts are of windows
        window_tokens = np.array([source.tokens / source.windows for source in self.sources])
        counts = counts_of([s.weight for s in config.sources] / window_tokens)
        self._mixture = Mixture(counts, seed)
        self._window_tokens = float(np.average(window_tokens, weights=counts))
        content = [seed, config.max_tokens, *counts, *(source.content for source in self.sources)]
        self.order_fingerprint = hashlib.sha256(str(content).encode()).hexdigest()
        """Equal for streams in which global sample i is the same window for every i."""
        self._check_size()

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all sources, each counted once."""
        return sum(source.tokens for source in self.sources)

    def epochs(self, sample: int) -> list[float]:
        """How often each source has been read when global sample `sample` is next, on average over the order."""
        shares = self._mixture.counts / self._mixture.counts.sum()
        return [float(sample * s / source.windows) for s, source in zip(shares, self.sources, strict=True)]

    def _check_size(self) -> None:
        config = self.config
        step = self.plan(0)
        for source, epochs in zip(self.sources, self.epochs(step.next_sample), strict=True):
            if epochs > 1:
                needed = f"of {config.row_tokens} tokens" if config.packed else "with a window each"
                raise DataError(
                    f"{source.name}: split {config.split!r} holds {source.windows} windows, {source.tokens} tokens; "
                    f"one step of {self.rows_per_step} rows {needed} reads more: take a larger corpus, a larger "
                    "split, or fewer rows per step"
                )

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, Windows]:
        """(source int64, window) of each of the global samples (int64, any epochs)."""
        chosen, positions = self._mixture.locate(samples)
        if len(self.sources) == 1:
            return chosen, self.sources[0].locate(positions)
        columns = np.empty((3, len(samples)), np.int64)
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(chosen == number)
            found = source.locate(positions[own])
            columns[:, own] = found.document, found.start, found.length
        return chosen, Windows(*columns)

    def plan(self, sample: int) -> StepPlan:
        """The step that begins at global sample `sample`."""
        if not self.config.packed:
            samples = np.arange(sample, sample + self.rows_per_step, dtype=np.int64)
            tokens = int(self._locate(samples)[1].length.sum())
            return StepPlan(sample, sample + self.rows_per_step, list(samples[:, None]), tokens)
        room = self.rows_per_step * self.config.row_tokens
        count = int(1.2 * room / self._window_tokens) + 16
        while True:
            samples = np.arange(sample, sample + count, dtype=np.int64)
            lengths = self._locate(samples)[1].length
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
        if self._hidden_width is not None:
            hidden = torch.zeros(*shape, self._hidden_width, dtype=torch.bfloat16)
            valid = torch.zeros(shape, dtype=torch.bool)
        ramp = np.arange(self.config.max_tokens)
        numbers, found = self._locate(np.concatenate([np.empty(0, np.int64), *chosen]))
        windows = zip(*(a.tolist() for a in (numbers, found.document, found.start, found.length)), strict=True)
        for r, samples in enumerate(chosen):
            at = 0
            keys = []
            for s, (number, *window) in enumerate(islice(windows, len(samples))):
                source, length = self.sources[number], window[-1]
                end = at + length
                key, tokens[r, at:end] = source.read(*window)
                keys.append(key)
                segment[r, at:end] = s
                position[r, at:end] = ramp[:length]
                if source.hidden is not None and hidden is not None and valid is not None:
                    states = source.states(*window)
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
