"""One loader for SentencePiece and Hugging Face tokenizers.

Both give the same few things: ids without special tokens, lossless text back, an end-of-document id, and a
fingerprint by which shards, models and teacher states recognise each other.
"""

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatext.config import ConfigError

SENTENCEPIECE_FILE = "tokenizer.model"
_HUGGING_FACE_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json")


class Tokenizer(ABC):
    """Text to ids and back. `load_tokenizer` builds one."""

    vocab_size: int
    """Number of entries; every id is below it. A network may have more rows, never fewer."""
    eos_id: int
    """Ends every document in the shards."""
    pad_id: int
    """What a padded batch of generated ids may be filled with."""
    end_ids: tuple[int, ...]
    """What a model may end a text with: eos_id, and `<|im_end|>` where the vocabulary has it, at which released models
    stop that were also trained on turns of a conversation."""
    start_ids: tuple[int, ...] = ()
    """Special tokens that stand before every text in models of this tokenizer (`<s>` of Llama)."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and for each id how many characters of the text it and those before it cover whole.

        These are the places where a text may be cut by tokens: a character of several tokens belongs to its last one,
        and what no token covers at the end of the text to the last token. Raises ValueError for a tokenizer that does
        not tell offsets."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens give nothing, broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) over the content that decides what ids mean; survives `save` and `load_tokenizer`."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, so that `load_tokenizer(directory)` gives it back."""

    @abstractmethod
    def save_json(self, directory: str | Path) -> None:
        """Write tokenizer.json, as Hugging Face's tokenizers read it, and what names its end of text. Raises ValueError
        for a tokenizer that cannot be written so."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece unigram model as `data_tools.train_tokenizer` makes it: lossless on any text."""

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        self.end_ids = (self.eos_id,)
        self.pad_id = max(self._processor.pad_id(), 0)
        self._bytes = [self._processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        is_control, is_unknown = self._processor.is_control, self._processor.is_unknown
        self._special = {i for i in range(self.vocab_size) if is_control(i) or is_unknown(i)}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(texts, num_threads=1)
        for number, text in enumerate(texts):
            if "\u2581" in text or "\0" in text:
                encoded[number] = self._encode_by_parts(text)
        return encoded

    def _encode_by_parts(self, text: str) -> list[int]:
        # SentencePiece writes a space as U+2581 and ends a string at NUL: these two characters go in as bytes.
        ids: list[int] = []
        for part in re.split("([\u2581\0])", text):
            ids += [self._bytes[b] for b in part.encode()] if part in ("\u2581", "\0") else self._processor.encode(part)
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in re.split("([\u2581\0])", text):
            if part in ("\u2581", "\0"):
                own = [self._bytes[b] for b in part.encode()]
                places = [(0, 0)] * (len(own) - 1) + [(0, 1)]
            else:
                found = self._processor.encode(part, return_type="offset_mapping")
                own, places = found["ids"], found["offsets"]
            ids += own
            offsets += [(start + first, start + last) for first, last in places]
            start += len(part)
        return ids, _ends(offsets, len(text))

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in map(int, ids) if i not in self._special])

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / SENTENCEPIECE_FILE).write_bytes(self._model)

    def save_json(self, directory: str | Path) -> None:
        from tokenizers import AddedToken, decoders, models, normalizers
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        pieces = [(self._processor.id_to_piece(i), self._processor.get_score(i)) for i in range(self.vocab_size)]
        backend = Backend(models.Unigram(pieces, unk_id=self._processor.unk_id(), byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts)
        backend.add_special_tokens([AddedToken(pieces[i][0], special=True) for i in sorted(self._special)])
        tokens = {"eos_token": pieces[self.eos_id][0], "pad_token": pieces[self.pad_id][0]}
        PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(str(directory))


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer that transformers loads. The end of a document is `<|endoftext|>` where the vocabulary has it
    (Qwen3, GPT-2: what they were pretrained with), else the tokenizer's own eos."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        files = {path.name for path in Path(name).glob("*.json")}
        if "tokenizer.json" in files and not files & {"tokenizer_config.json", "config.json"}:
            self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(Path(name) / "tokenizer.json"))
        else:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        self.vocab_size = len(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab()
        eos = vocabulary.get("<|endoftext|>", self._tokenizer.eos_token_id)
        if eos is None:
            raise ConfigError(f"tokenizer {name}: no end-of-text token; set `eos_token` in tokenizer_config.json")
        self.eos_id = int(eos)
        self.end_ids = (self.eos_id, *([vocabulary["<|im_end|>"]] if "<|im_end|>" in vocabulary else []))
        whole = self._tokenizer("a")["input_ids"]
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        self.start_ids = tuple(whole[: next((i for i in range(len(whole)) if whole[i:][: len(bare)] == bare), 0)])
        self._backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)  # the Rust one, where there is one
        if self._backend is not None:  # some tokenizer.json ask for them
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True  # a text that speaks of <|endoftext|> does not end there
        pad = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:  # without the offsets and lists that transformers makes of them
            return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return encoded

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        if self._backend is None:
            raise ValueError(f"{self._tokenizer.name_or_path}: tells no offsets; take a tokenizer with tokenizer.json")
        found = self._backend.encode(text, add_special_tokens=False)
        ends = _ends(found.offsets, len(text))
        # Normalisers (Qwen3's NFC) give a letter and its accents as one character with the letter's place alone.
        starts = {first for first, _ in found.offsets}
        for i, end in enumerate(ends):
            while end < len(text) and unicodedata.combining(text[end]) and end not in starts:
                end += 1
            ends[i] = end
        return found.ids, ends

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in map(int, ids) if i != self.eos_id]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def fingerprint(self) -> str:
        content: dict[str, Any] = {"vocabulary": sorted(self._tokenizer.get_vocab().items())}
        if self._backend is not None:
            merges = json.loads(self._backend.to_str())["model"].get("merges") or []
            content["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        self._tokenizer.save_pretrained(str(directory))

    def save_json(self, directory: str | Path) -> None:
        if self._backend is None:
            raise ValueError(f"{self._tokenizer.name_or_path}: has no tokenizer.json, and none can be made of it")
        self.save(directory)


def _ends(offsets: list[tuple[int, int]], length: int) -> list[int]:
    """Where each token's last whole character ends: bytes of one character all carry that character's offsets."""
    starts = [first for first, _ in offsets[1:]]
    ends = [min(last, following) for (_, last), following in zip(offsets, starts, strict=False)]
    return [*ends, length] if offsets else []


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a directory (SentencePiece `tokenizer.model`, or Hugging Face files; other files may lie there
    too), of a `*.model` file, or, where no such path exists, of a name on the Hugging Face hub.

    Raises FileNotFoundError for a directory without a tokenizer.
    """
    path = Path(path_or_name)
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes())
    if path.is_dir():
        if any((path / name).is_file() for name in _HUGGING_FACE_FILES):
            return HuggingFaceTokenizer(str(path))
        if (path / SENTENCEPIECE_FILE).is_file():
            return SentencePieceTokenizer((path / SENTENCEPIECE_FILE).read_bytes())
        raise FileNotFoundError(f"{path}: no {SENTENCEPIECE_FILE} and no Hugging Face tokenizer files here")
    if path.is_absolute() or str(path_or_name).count("/") > 1 or str(path_or_name).startswith("."):
        raise FileNotFoundError(f"{path}: no such tokenizer directory or file")
    return HuggingFaceTokenizer(str(path_or_name))
