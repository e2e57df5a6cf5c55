"""The training stream: which windows make up the step that begins at global sample i, and their tokens.

Global sample i belongs to a source and a position in it (megatext.data.mixture), the position to a window
(megatext.data.source). A step takes the longest prefix of the next samples that packs into its rows, so the step after
it, and everything a resumed run needs, follows from i alone. Plans need lengths only; every rank computes the whole
plan and reads its own rows.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megatext.config import ConfigError
from megatext.data import DataError
from megatext.data.mixture import BLOCK, Mixture, counts_of
from megatext.data.packing import TokenBatch, pack_prefix
from megatext.data.remote import is_remote
from megatext.data.source import WindowSource

_CHUNK = 4096
"""Samples that are looked up at once."""


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

    def without_states(self) -> "DataConfig":
        """The same tokens, no teacher states."""
        more = tuple(replace(source, hidden_states=None) for source in self.more_sources)
        return replace(self, hidden_states=None, more_sources=more)


@dataclass(frozen=True)
class Located:
    """Where the tokens of consecutive global samples lie; int64 `[samples]` each."""

    source: np.ndarray
    document: np.ndarray
    """Number in its source."""
    start: np.ndarray
    """First token within the document."""
    length: np.ndarray
    shard: np.ndarray
    """Number in its source."""
    element: np.ndarray
    """First token within the shard's file."""

    def __getitem__(self, chosen: slice | np.ndarray) -> "Located":
        return Located(*(column[chosen] for column in vars(self).values()))

    @staticmethod
    def concatenate(parts: list["Located"]) -> "Located":
        """One after another."""
        return Located(*(np.concatenate(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))


@dataclass(frozen=True)
class StepPlan:
    """One global step: the samples [first_sample, next_sample), and which row each goes to."""

    first_sample: int
    """Global index of the step's first sample."""
    next_sample: int
    """Where the next step begins: the only state of the stream."""
    rows: list[np.ndarray]
    """For each row of the step the int64 global indices of its samples, ascending. May be empty for a last row."""
    windows: Located
    """Of the step's samples, in their order."""

    @property
    def tokens(self) -> int:
        """Real tokens in all rows, padding not counted."""
        return int(self.windows.length.sum())


class DocumentKeys(Sequence[list[str]]):
    """The keys of each row's documents, looked up when they are asked for: only error messages ask."""

    def __init__(self, sources: list[WindowSource], windows: Located, per_row: np.ndarray) -> None:
        self._sources, self._windows, self._ends = sources, windows, np.cumsum(per_row)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        if row >= len(self):
            raise IndexError(row)
        found = self._windows[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]
        pairs = zip(found.source.tolist(), found.document.tolist(), strict=True)
        return [self._sources[source].key(document) for source, document in pairs]


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
        self.tokenizer_fingerprint, self.vocab_size = first.tokenizer_fingerprint, first.vocab_size
        for other in self.sources[1:]:
            if other.tokenizer_fingerprint != self.tokenizer_fingerprint:
                raise DataError(f"{other.name}: made with another tokenizer than {first.name}; shard one of them again")
        self._hidden_width = _common_width(self.sources)
        # weights are shares of tokens, counts are of windows
        window_tokens = np.array([source.tokens / source.windows for source in self.sources])
        counts = counts_of([s.weight for s in config.sources] / window_tokens)
        if 0 in counts:
            name = self.sources[counts.index(0)].name
            raise DataError(
                f"{name}: its weight makes it less than one sample in {BLOCK}; leave it out, or give it more"
            )
        self._mixture = Mixture(counts, seed)
        self._chunks: dict[int, Located] = {}
        # all files of all sources, and one of padding
        of_sources = [source.files() for source in self.sources]
        self._first_file = np.cumsum([0] + [len(files) for files in of_sources])
        padding = np.zeros(config.row_tokens, of_sources[0][0].dtype)
        self._files = [*(file for files in of_sources for file in files), padding]
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

    def locate(self, first: int, stop: int) -> Located:
        """The windows of the global samples [first, stop), of any epochs."""
        chunks, known = range(first // _CHUNK, -(-stop // _CHUNK)), self._chunks
        self._chunks = {number: known[number] if number in known else self._chunk(number) for number in chunks}
        parts = list(self._chunks.values())
        whole = parts[0] if len(parts) == 1 else Located.concatenate(parts)
        return whole[first - chunks.start * _CHUNK : stop - chunks.start * _CHUNK]

    def _chunk(self, number: int) -> Located:
        """The windows of _CHUNK samples at once, as the next steps need them too: numpy's cost is more a call's than an
        element's."""
        chosen, positions = self._mixture.locate(np.arange(number * _CHUNK, (number + 1) * _CHUNK))
        table = np.empty((5, _CHUNK), np.int64)
        for which, source in enumerate(self.sources):
            own = np.flatnonzero(chosen == which)
            windows = source.locate(positions[own])
            table[:, own] = windows.document, windows.start, windows.length, *source.elements(windows)
        return Located(chosen, *table)

    def plan(self, sample: int) -> StepPlan:
        """The step that begins at global sample `sample`."""
        if not self.config.packed:
            samples = np.arange(sample, sample + self.rows_per_step, dtype=np.int64)
            stop = sample + self.rows_per_step
            return StepPlan(sample, stop, list(samples[:, None]), self.locate(sample, stop))
        room = self.rows_per_step * self.config.row_tokens
        count = int(1.2 * room / self._window_tokens) + 16
        while (windows := self.locate(sample, sample + count)).length.sum() <= room:
            count *= 2
        count, row = pack_prefix(windows.length, self.rows_per_step, self.config.row_tokens)
        order = np.argsort(row, kind="stable")
        cuts = np.searchsorted(row[order], np.arange(self.rows_per_step + 1)).tolist()
        samples = sample + order
        rows = [samples[start:stop] for start, stop in pairwise(cuts)]
        return StepPlan(sample, sample + count, rows, windows[:count])

    def batch(self, plan: StepPlan, rows: slice | list[int]) -> TokenBatch:
        """The chosen rows of a step. Reads only their documents."""
        chosen = plan.rows[rows] if isinstance(rows, slice) else [plan.rows[r] for r in rows]
        per_row = np.array([len(samples) for samples in chosen], np.int64)
        samples = np.concatenate([np.empty(0, np.int64), *chosen])
        windows = plan.windows[samples - plan.first_sample]
        shape = (len(chosen), self.config.row_tokens)
        size, file, element, ordinal, begin = self._pieces(windows, per_row)
        slices = zip(file.tolist(), element.tolist(), size.tolist(), strict=True)
        # joined, then widened: numpy's join that widens takes twice as long
        tokens = np.concatenate([self._files[f][first : first + n] for f, first, n in slices]).astype(np.int64)
        position = np.repeat(begin, size)
        np.subtract(np.arange(len(position)), position, out=position)
        padding = ordinal < 0
        for start, n in zip(begin[padding].tolist(), size[padding].tolist(), strict=True):
            position[start : start + n] = 0
        first_sample = np.append(samples, -1)[np.where(per_row > 0, np.cumsum(per_row) - per_row, -1)]
        hidden, valid = self._states(windows, begin[~padding], shape)
        return TokenBatch(
            torch.from_numpy(tokens.reshape(shape)),
            torch.from_numpy(np.repeat(ordinal, size).reshape(shape)),
            torch.from_numpy(position.reshape(shape)),
            torch.from_numpy(first_sample),
            DocumentKeys(self.sources, windows, per_row),
            hidden,
            valid,
        )

    def _pieces(self, windows: Located, per_row: np.ndarray) -> np.ndarray:
        """The rows of a batch as pieces one after another: `per_row[r]` windows and a piece of padding for row r. int64
        `[5, pieces]`: size, number of the file, first element in it, number in its row (-1 for padding), and where it
        begins in all rows laid end to end."""
        rows, count = len(per_row), len(windows.length)
        row = np.repeat(np.arange(rows), per_row)
        window, padding = np.arange(count) + row, np.cumsum(per_row) + np.arange(rows)
        table = np.empty((5, count + rows), np.int64)
        number = np.arange(count) - (np.cumsum(per_row) - per_row)[row]
        table[:4, window] = windows.length, self._first_file[windows.source] + windows.shard, windows.element, number
        used = np.bincount(row, windows.length, rows).astype(np.int64)
        table[0, padding] = self.config.row_tokens - used
        table[1:4, padding] = np.array([[len(self._files) - 1], [0], [-1]])
        table[4] = np.cumsum(table[0]) - table[0]
        return table

    def _states(
        self, windows: Located, begin: np.ndarray, shape: tuple[int, int]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher states of a batch's windows and where they are valid; None without any source that has some."""
        if self._hidden_width is None:
            return None, None
        hidden = torch.zeros(shape[0] * shape[1], self._hidden_width, dtype=torch.bfloat16)
        valid = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        columns = (windows.source, windows.document, windows.start, windows.length, begin)
        for number, document, start, length, at in zip(*(column.tolist() for column in columns), strict=True):
            source = self.sources[number]
            if source.hidden is not None:
                states = source.states(document, start, length)
                hidden[at : at + len(states)] = states
                valid[at : at + len(states)] = True
        return hidden.view(*shape, -1), valid.view(shape)

    def micro_batches(self, plan: StepPlan, rank: int, count: int, rows: int) -> list[TokenBatch]:
        """A rank's `count` consecutive batches of `rows` rows of a step."""
        first = rank * count * rows
        return [self.batch(plan, slice(start, start + rows)) for start in range(first, first + count * rows, rows)]


def _common_width(sources: list[WindowSource]) -> int | None:
    """Width of the teacher states; None where no source has some. Raises DataError unless all are one teacher's."""
    hidden = [source.hidden for source in sources if source.hidden is not None]
    for other in hidden[1:]:
        for key in ("teacher_fingerprint", "layer", "width", "causal"):
            mine, theirs = hidden[0].manifest.get(key), other.manifest.get(key)
            if mine != theirs:
                raise DataError(
                    f"{other.directory}: states with {key} {theirs}, those of {hidden[0].directory} have {mine}"
                )
    return hidden[0].width if hidden else None
