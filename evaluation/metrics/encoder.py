"""Hidden states of any Hugging Face directory: one layer of every token (BERTScore), the last token (MAUVE)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatext.config import ConfigError

# Layers that bert-score 0.3.13 chose by correlation with human judgement: by the model's name, else by kind and depth.
_LAYER_OF_NAME = {
    "roberta-large": 17, "roberta-large-mnli": 19, "roberta-base": 10, "distilroberta-base": 5, "bert-base-uncased": 9,
    "bert-large-uncased": 18, "distilbert-base-uncased": 5, "xlm-roberta-base": 9, "xlm-roberta-large": 17,
    "bart-base": 6, "bart-large": 10, "mpnet-base": 8, "deberta-base": 9, "deberta-base-mnli": 9, "deberta-large": 16,
    "deberta-large-mnli": 18, "deberta-xlarge": 18, "deberta-xlarge-mnli": 40, "deberta-v3-large": 12,
}  # fmt: skip
_LAYER_OF_KIND = {("roberta", 24): 17, ("roberta", 12): 10, ("bert", 24): 18, ("bert", 12): 9, ("distilbert", 6): 5}
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
        name: str | None = None,
    ) -> None:
        """`name` is what the model is called where its directory is not called so (the hub's cache)."""
        from transformers import AutoModel

        self.device = device
        loaded: Any = (AutoModel.from_pretrained(directory, dtype=dtype) if model is None else model).eval().to(device)
        config: Any = loaded.config
        self.model: Any = loaded.get_encoder() if config.is_encoder_decoder else loaded
        self.layers: int = config.num_hidden_layers
        by_kind = _LAYER_OF_KIND.get((config.model_type, self.layers), max(1, round(0.7 * self.layers)))
        self.bertscore_layer = _LAYER_OF_NAME.get(name or directory.name, by_kind)
        self._tokenizer, self.outer_ids, longest = _tokenizer(directory)
        positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.max_tokens = min(positions - _first_position(self.model), longest)

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
            # Without padding no mask is needed, and a causal model runs faster without one.
            ragged = len({len(sequences[i]) for i in batch}) > 1
            mask = (torch.arange(width, device=self.device) < lengths[:, None]).long() if ragged else None
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


def _first_position(model: nn.Module) -> int:
    """Rows of the position table that no token uses: RoBERTa and its kin begin behind their padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _tokenizer(directory: Path) -> tuple[Encode, set[int], int]:
    """((texts, longest) -> ids, ids of the outer special tokens, tokens that the tokenizer says the model reads) of a
    SentencePiece or a Hugging Face directory."""
    if (directory / "tokenizer.model").exists() and not (directory / "tokenizer.json").exists():
        from megatext.tokenizer import load_tokenizer

        pieces = load_tokenizer(directory)
        return lambda texts, longest: [row[:longest] for row in pieces.encode_batch(list(texts))], set(), 1 << 30
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)

    def encode(texts: Sequence[str], longest: int | None) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(list(texts), truncation=longest is not None, max_length=longest, verbose=False)["input_ids"]

    return encode, {tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}, min(tokenizer.model_max_length, 1 << 30)
