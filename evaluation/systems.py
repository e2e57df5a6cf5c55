"""Systems: anything that writes a continuation. Checkpoints, Hugging Face models, files, and the sanity rows."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.files import hash_of, hash_of_code, hash_of_file, hash_of_model, read_jsonl
from evaluation.manifest import Manifest, Sample
from megatext.config import ConfigError, from_dict
from megatext.data import DataError

SANITY = ("human", "other", "shuffled", "repeat", "empty")
"""Rows that need no model and show what a number means."""


@dataclass(frozen=True)
class SystemEntry:
    """One row of the table, as the systems file has it."""

    name: str
    """Name of the row; unique."""
    system: str
    """`model:DIR`, `hf:DIR`, `jsonl:FILE`, or a sanity row: human, other, shuffled, repeat, empty."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keys of SamplingConfig for model:, of CausalSampling for hf:."""
    batch_size: int = 100
    """Texts written at once; a text does not depend on its neighbours but for rounding."""
    unconditional: int = 0
    """Passages to write without a prefix; scored by nll, entropy and distinct-2 only."""
    unconditional_tokens: int | None = None
    """Their length in the system's tokens; None: as long as the task's documents may be."""


@dataclass(frozen=True)
class Request:
    """One text to write."""

    id: str
    """Of the sample; for an unconditional passage its number."""
    prefix: str
    """"" for an unconditional passage."""
    target_tokens: int
    """How many of the system's own tokens to write."""
    seed: int
    """All randomness of this text."""


@dataclass(frozen=True)
class Written:
    """One text, as a system wrote it."""

    text: str
    """The continuation without its prefix."""
    ids: list[int] | None = None
    """Token ids where decoding and encoding again would change them (shuffled tokens), of `Writer.ids_tokenizer`."""


class Writer(ABC):
    """A system ready to write."""

    fingerprint: str
    """What writes, by content: two writers of one fingerprint write the same."""
    weights: str | None = None
    """hash_of_model of the directory; None without one."""
    started_from: str | None = None
    """weights_hash of the model that this one's training started from; None where it started from random weights."""
    timed: bool = False
    """Whether seconds per text mean anything."""
    ids_tokenizer: str | None = None
    """Fingerprint of the tokenizer of Written.ids."""

    def target_tokens(self, sample: Sample) -> int:
        """Length of the sample's target in the system's own tokens; its reference length where it has none."""
        return sample.n_ref_target_tokens

    @abstractmethod
    def write(self, requests: Sequence[Request]) -> list[Written]:
        """One text for each request."""


def load_systems(path: Path) -> list[SystemEntry]:
    """Read a systems file: a YAML list of entries. `human` and `shuffled`, which G needs, are added if missing."""
    import yaml

    if not path.is_file():
        raise ConfigError(f"{path}: no such systems file")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ConfigError(f"{path}: expected a list of entries with the keys name and system")
    return complete([from_dict(SystemEntry, item, where=f"{path}, entry {i + 1}") for i, item in enumerate(data)])


def complete(entries: Sequence[SystemEntry]) -> list[SystemEntry]:
    """Check names and put the rows that G is measured between first."""
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"system {name}: the name stands twice in the systems file")
    present = {entry.system for entry in entries}
    return [SystemEntry(row, row) for row in ("human", "shuffled") if row not in present] + list(entries)


def open_writer(entry: SystemEntry, manifest: Manifest, *, judge_dir: Path | None, device: str) -> Writer:
    """Make an entry ready. Reads no weights before the first text, so that a cached system costs their hash only."""
    kind, _, rest = entry.system.partition(":")
    if entry.system in SANITY:
        return SanityRow(entry.system, manifest, judge_dir)
    if kind == "jsonl":
        return FileWriter(Path(rest), manifest)
    if kind == "hf":
        sampling = from_dict(CausalSampling, entry.sampling, where=f"system {entry.name}, sampling")
        return CausalWriter(Path(rest), sampling, device)
    if kind == "model":
        return ModelWriter(Path(rest), entry, device)
    raise ConfigError(
        f"system {entry.name}: unknown system {entry.system!r}; write model:DIR, hf:DIR, jsonl:FILE or one of "
        f"{', '.join(SANITY)}"
    )


class SanityRow(Writer):
    """Rows without a model: the human target, another document's, shuffled tokens, the prefix again, nothing."""

    def __init__(self, kind: str, manifest: Manifest, judge_dir: Path | None) -> None:
        self.kind = kind
        self._samples = {sample.id: sample for sample in manifest.samples}
        ids = list(self._samples)
        self._next = dict(zip(ids, ids[1:] + ids[:1], strict=True))
        if kind == "shuffled":
            if judge_dir is None:
                raise ConfigError("the row `shuffled` shuffles the judge's tokens: give --judge DIR")
            from megatext.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(judge_dir)
            self.ids_tokenizer = self._tokenizer.fingerprint()
        self.fingerprint = hash_of(["sanity", kind, self.ids_tokenizer, hash_of_code(Path(__file__))])

    def write(self, requests: Sequence[Request]) -> list[Written]:
        return [self._write(request) for request in requests]

    def _write(self, request: Request) -> Written:
        sample = self._samples[request.id]
        if self.kind == "human":
            return Written(sample.target)
        if self.kind == "other":
            return Written(self._samples[self._next[sample.id]].target)
        if self.kind == "shuffled":
            ids = self._tokenizer.encode(sample.target)
            random.Random(request.seed).shuffle(ids)
            return Written(self._tokenizer.decode(ids), ids)
        if self.kind == "repeat":
            again = " " + sample.prefix.strip()
            return Written((again * (len(sample.target) // len(again) + 1))[: len(sample.target)])
        return Written("")


class FileWriter(Writer):
    """Texts that were written elsewhere: JSONL with `id` and `text`, and `manifest` (a hash) if its maker gave one."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._texts: dict[str, str] = {}
        for record in read_jsonl(path):
            if record.get("manifest", manifest.hash) != manifest.hash:
                raise DataError(
                    f"{path}: written for manifest {str(record['manifest'])[:12]}, not for {manifest.hash[:12]}; "
                    "generate again from this manifest"
                )
            if "id" not in record or not isinstance(record.get("text"), str):
                raise DataError(f"{path}: every line needs `id` and `text`; found the keys {sorted(record)}")
            self._texts[str(record["id"])] = record["text"]
        missing = [sample.id for sample in manifest.samples if sample.id not in self._texts]
        if missing:
            raise DataError(
                f"{path}: lacks {len(missing)} of {len(manifest.samples)} samples, the first is {missing[0]}"
            )
        self.fingerprint = hash_of(["jsonl", hash_of_file(path)])

    def write(self, requests: Sequence[Request]) -> list[Written]:
        return [Written(self._texts[request.id]) for request in requests]


class ModelWriter(Writer):
    """A checkpoint exported by megatext, through TextGenerator."""

    timed = True

    def __init__(self, directory: Path, entry: SystemEntry, device: str) -> None:
        import megatext
        from megatext.generation.sampling import SamplingConfig
        from megatext.recipes.pretrained import read_description

        self.weights = hash_of_model(directory)
        self.started_from = read_description(directory, "text_dit").get("warm_start_hash")
        self._directory = directory
        self._device = device
        self._sampling = from_dict(SamplingConfig, entry.sampling, where=f"system {entry.name}, sampling")
        library = Path(megatext.__file__).parent
        code = hash_of_code(*(library / name for name in ("generation", "flow", "nn", "recipes")))
        self.fingerprint = hash_of(["model", self.weights, asdict(self._sampling), code])

    @cached_property
    def _generator(self) -> Any:
        from megatext.generation.text_generator import TextGenerator

        return TextGenerator.from_pretrained(self._directory, device=self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        from megatext.tokenizer import load_tokenizer

        return load_tokenizer(self._directory)

    def target_tokens(self, sample: Sample) -> int:
        return max(1, len(self._tokenizer.encode(sample.target)))

    def write(self, requests: Sequence[Request]) -> list[Written]:
        texts = self._generator.generate(
            [request.prefix for request in requests],
            target_tokens=[request.target_tokens for request in requests],
            seeds=[request.seed for request in requests],
            sampling=self._sampling,
        )
        return [Written(text) for text in texts]


@dataclass(frozen=True)
class CausalSampling:
    """How a Hugging Face causal LM is sampled."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this much probability together."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""


class CausalWriter(Writer):
    """A Hugging Face causal LM: left padding, key-value cache, a generator a text, the end of text barred.

    Barring the end gives every system the same length, as the diffusion models have it. Prefixes that do not fit
    beside the target are cut at their start.
    """

    timed = True

    def __init__(self, directory: Path, sampling: CausalSampling, device: str) -> None:
        self.weights = hash_of_model(directory)
        self.fingerprint = hash_of(["hf", self.weights, asdict(sampling), hash_of_code(Path(__file__))])
        self._directory = directory
        self._sampling = sampling
        self._device = device

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._directory).eval().to(self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        from megatext.tokenizer import load_tokenizer

        return load_tokenizer(self._directory)

    def target_tokens(self, sample: Sample) -> int:
        return max(1, len(self._tokenizer.encode(sample.target)))

    def write(self, requests: Sequence[Request]) -> list[Written]:
        import torch

        model, tokenizer, device = self._model, self._tokenizer, self._device
        config = model.config
        bos, eos = config.bos_token_id, tokenizer.eos_id
        own_start = [bos] if isinstance(bos, int) and bos != eos else []
        limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        prompts: list[list[int]] = []
        for request in requests:
            room = limit - request.target_tokens - len(own_start)
            if room < 1:
                raise ConfigError(f"{self._directory}: reads {limit} tokens, too few to write {request.target_tokens}")
            # With nothing before it, a text begins behind the end of another, as documents do in training.
            prompts.append((own_start + tokenizer.encode(request.prefix)[-room:]) or [eos])
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        barred = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        barred[[i for i in {eos, tokenizer.pad_id, bos} if isinstance(i, int) and 0 <= i < config.vocab_size]] = True
        barred[tokenizer.vocab_size :] = True
        generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]
        written: list[torch.Tensor] = []
        cache = None
        with torch.inference_mode():
            for _ in range(max(request.target_tokens for request in requests)):
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                ids = self._draw(output.logits[:, -1].float().masked_fill(barred, -torch.inf), generators)[:, None]
                written.append(ids)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        rows = torch.cat(written, dim=1).tolist()
        return [
            Written(self._decode(p, row[: r.target_tokens])) for p, row, r in zip(prompts, rows, requests, strict=True)
        ]

    def _draw(self, logits: Any, generators: Sequence[Any]) -> Any:
        """Token ids [rows] from logits [rows, vocabulary], each row by its own generator (Gumbel argmax)."""
        import torch

        sampling = self._sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / sampling.temperature
        if sampling.top_k:
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k, dim=-1).values[:, -1:], -torch.inf)
        if sampling.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(dim=-1)
            ordered = ordered.masked_fill(share.cumsum(dim=-1) - share >= sampling.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(1, order, ordered)
        noise = torch.stack([torch.rand(logits.shape[1], generator=g, device=g.device) for g in generators])
        return (logits - (-noise.clamp(min=1e-20).log()).log()).argmax(dim=-1)

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        """The new text; decoded behind its prompt, because some tokenizers drop a space at the start of a text."""
        before = self._tokenizer.decode(prompt)
        whole = self._tokenizer.decode(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(new)


def request_seed(seed: int, purpose: str, sample_id: str) -> int:
    """A 63-bit seed of one text from the run's seed, so that it depends on no other text."""
    from megatext.rng import derive_seed

    return derive_seed(seed, f"evaluation {purpose}", int(hashlib.sha256(sample_id.encode()).hexdigest()[:15], 16))
