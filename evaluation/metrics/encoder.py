"""Hidden states of any Hugging Face directory: one layer of every token (BERTScore), the last token (MAUVE)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatext.config import ConfigError

# Layers that bert-score chose by correlation with human judgement, keyed by (model_type, layers).
_BERTSCORE_LAYER = {("roberta", 24): 17, ("roberta", 12): 10, ("bert", 24): 18, ("bert", 12): 9, ("distilbert", 6): 5}
_MAX_BATCH_TOKENS = 8192
_MAX_BATCH_ROWS = 256


class Encoder:
    """A frozen trunk and its tokenizer. `model` may be the trunk of a causal LM already loaded from the directory."""

    def __init__(
        self,
        directory: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        model: nn.Module | None = None,
    ) -> None:
        from transformers import AutoModel

        self.device = device
        self.model: Any = (
            (AutoModel.from_pretrained(directory, dtype=dtype) if model is None else model).eval().to(device)
        )
        config: Any = self.model.config
        self.layers: int = config.num_hidden_layers
        self.bertscore_layer = _BERTSCORE_LAYER.get((config.model_type, self.layers), max(1, round(0.7 * self.layers)))
        architecture = (config.architectures or [""])[0]
        # A causal network's states do not see the padding to their right, and run faster without a mask.
        self._causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        self._tokenizer, self.outer_ids = _tokenizer(directory)
        positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        # RoBERTa's position table starts behind its padding index.
        self.max_tokens = positions - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Ids with the special tokens the model was trained with (CLS and SEP; none for causal models), and which texts
        were cut at their end because the model does not read more."""
        ids = self._tokenizer(texts, None)
        cut = [len(row) > self.max_tokens for row in ids]
        if any(cut):
            ids = self._tokenizer(texts, self.max_tokens)
        return ids, cut

    def states(self, sequences: Sequence[Sequence[int]], layer: int | None) -> Iterator[tuple[int, Tensor]]:
        """(index, fp32 states [tokens, width] on the device) of each non-empty sequence, shortest first.

        The model is cut behind block `layer`, counted from 1 (its final norm, if it has one, stays); None is the whole
        model.
        """
        order = sorted((i for i in range(len(sequences)) if sequences[i]), key=lambda i: len(sequences[i]))
        while order:
            longest = len(sequences[order[:_MAX_BATCH_ROWS][-1]])
            rows = min(_MAX_BATCH_ROWS, max(1, _MAX_BATCH_TOKENS // longest))
            batch, order = order[:rows], order[rows:]
            width = max(len(sequences[i]) for i in batch)
            ids = torch.tensor([[*sequences[i], *[0] * (width - len(sequences[i]))] for i in batch], device=self.device)
            lengths = torch.tensor([len(sequences[i]) for i in batch], device=self.device)
            mask = None if self._causal else (torch.arange(width, device=self.device) < lengths[:, None]).long()
            with torch.inference_mode(), self._cut(layer):
                states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, i in enumerate(batch):
                yield i, states[row, : len(sequences[i])].float()

    @contextlib.contextmanager
    def _cut(self, layer: int | None) -> Iterator[None]:
        """The model without the blocks behind `layer`, for the time of a call."""
        if layer is None or layer == self.layers:
            yield
            return
        places = [
            (parent, name)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == self.layers
        ]
        if not places or not 1 <= layer <= self.layers:
            raise ConfigError(
                f"BERTScore layer {layer}: {type(self.model).__name__} has {self.layers} blocks and cannot be cut there"
            )
        parent, name = places[0]
        whole = getattr(parent, name)
        setattr(parent, name, whole[:layer])
        try:
            yield
        finally:
            setattr(parent, name, whole)

    def last_token(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """MAUVE's feature: fp32 [len(sequences), width] on the CPU; zeros for an empty sequence, a point of its own."""
        width = self.model.config.hidden_size
        features = torch.zeros(len(sequences), width)
        for i, states in self.states(sequences, None):
            features[i] = states[-1].cpu()
        return features


Encode = Callable[[Sequence[str], int | None], list[list[int]]]


def _tokenizer(directory: Path) -> tuple[Encode, set[int]]:
    """((texts, longest) -> ids, ids of the outer special tokens) of a SentencePiece or a Hugging Face directory."""
    if (directory / "tokenizer.model").exists() and not (directory / "tokenizer.json").exists():
        from megatext.tokenizer import load_tokenizer

        pieces = load_tokenizer(directory)
        return lambda texts, longest: [row[:longest] for row in pieces.encode_batch(list(texts))], set()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)

    def encode(texts: Sequence[str], longest: int | None) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(list(texts), truncation=longest is not None, max_length=longest, verbose=False)["input_ids"]

    return encode, {tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}
