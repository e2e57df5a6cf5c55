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
