"""Documents to windows: consecutive pieces of at most `max_tokens` tokens, the last one shorter."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """The windows of a list of documents, in order."""

    document: np.ndarray
    """int64 `[windows]`: index of the window's document."""
    start: np.ndarray
    """int64 `[windows]`: first token within the document."""
    length: np.ndarray
    """int64 `[windows]`: number of tokens, 1 to max_tokens."""

    def __len__(self) -> int:
        return len(self.document)


def cut(document_lengths: np.ndarray, max_tokens: int) -> Windows:
    """Windows that cover every token of every document exactly once; empty documents have none."""
    counts = -(-document_lengths // max_tokens)
    document = np.repeat(np.arange(len(document_lengths), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document), dtype=np.int64) - first[document]) * max_tokens
    return Windows(document, start, np.minimum(document_lengths[document] - start, max_tokens))


class WindowIndex:
    """The windows of a corpus by number, found when they are asked for: 12 bytes a document, none a window."""

    def __init__(self, document_lengths: list[np.ndarray], max_tokens: int) -> None:
        """`document_lengths`: int64 arrays, one a shard."""
        self._max_tokens = max_tokens
        self._lengths = np.concatenate([np.empty(0, np.uint32), *(part.astype(np.uint32) for part in document_lengths)])
        self._ends = np.cumsum((self._lengths + np.int64(max_tokens - 1)) // max_tokens, dtype=np.int64)
        """Windows up to the end of each document."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, numbers: np.ndarray) -> Windows:
        """Windows of these numbers (int64), in their order; as `cut` would number them."""
        document = np.searchsorted(self._ends, numbers, side="right")
        length = self._lengths[document].astype(np.int64)
        first = self._ends[document] - -(-length // self._max_tokens)
        start = (numbers - first) * self._max_tokens
        return Windows(document, start, np.minimum(length - start, self._max_tokens))
