"""One shard directory as an endless sequence of windows, every window once an epoch."""

import numpy as np
from torch import Tensor

from megatext.data import DataError
from megatext.data.hidden_states import HiddenStates
from megatext.data.order import Permutation
from megatext.data.remote import fetch, local_folder
from megatext.data.shards import read_manifest, split_fingerprint
from megatext.data.tar_index import TarIndex
from megatext.data.windows import WindowIndex, Windows


class WindowSource:
    """Position j is window number permutation(epoch j // n)(j % n) of n.

    Raises DataError for shards that are missing, damaged or not what their manifest says, and for an empty split.
    """

    def __init__(self, shards: str, split: str, *, max_tokens: int, hidden_states: str | None, seed: int) -> None:
        self.name = shards
        self._seed = seed
        folder = local_folder(shards)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise DataError(f"{shards}: no split {split!r}, only {', '.join(manifest['splits'])}")
        entries = manifest["splits"][split]["shards"]
        fetch(shards, entries, folder)
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self._shards = [TarIndex(folder / entry["file"], sha256=entry["sha256"]) for entry in entries]
        lengths = [shard.lengths for shard in self._shards]
        self._first_document = np.cumsum([0] + [len(part) for part in lengths])
        self._windows = WindowIndex(lengths, max_tokens)
        self.windows = len(self._windows)
        """Windows an epoch."""
        self.tokens = sum(int(part.sum()) for part in lengths)
        """Tokens an epoch."""
        if self.windows == 0:
            raise DataError(f"{shards}: split {split!r} holds no documents; take a larger corpus or a larger split")
        self.content = split_fingerprint(manifest, split)
        """What lies in the shards, and in which order."""
        self.hidden: HiddenStates | None = None
        if hidden_states is not None:
            self.hidden = HiddenStates(hidden_states, split)
            self.hidden.check(tokenizer_fingerprint=self.tokenizer_fingerprint, max_tokens=max_tokens, of=self.content)
        self._permutations: dict[int, Permutation] = {}

    def locate(self, positions: np.ndarray) -> Windows:
        """The windows at these positions (int64, of any epochs)."""
        epochs = positions // self.windows
        numbers = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._permutations:
                if len(self._permutations) > 8:
                    self._permutations.clear()
                self._permutations[epoch] = Permutation(self.windows, self._seed, epoch)
            chosen = epochs == epoch
            numbers[chosen] = self._permutations[epoch](positions[chosen] % self.windows)
        return self._windows.locate(numbers)

    def elements(self, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first element) of each window, int64: where its tokens lie in `files()[shard]`."""
        shard = np.searchsorted(self._first_document, windows.document, side="right") - 1
        element = windows.start.copy()
        for number in np.unique(shard).tolist():
            chosen, index = shard == number, self._shards[number]
            documents = windows.document[chosen] - self._first_document[number]
            element[chosen] += index.offsets[documents] // index.dtype.itemsize
        return shard, element

    def files(self) -> list[np.ndarray]:
        """Every shard's file as token ids, headers and all."""
        return [shard.flat for shard in self._shards]

    def key(self, document: int) -> str:
        """A document's key."""
        shard, number = self._place(document)
        return self._shards[shard].key(number)

    def states(self, document: int, start: int, length: int) -> Tensor:
        """Teacher states of a window, bfloat16 `[n, width]`: n < length, or 0, where fewer were extracted."""
        assert self.hidden is not None
        shard, number = self._place(document)
        return self.hidden.read(self._shards[shard].path.name, number, start, start + length)

    def _place(self, document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return shard, document - int(self._first_document[shard])
