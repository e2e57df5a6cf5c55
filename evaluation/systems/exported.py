"""Models that megatext exported, but for causal LMs, which are Hugging Face directories."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evaluation.files import hash_of, hash_of_model
from evaluation.systems.base import Item, Nats, System, Written, item_seed, own_tokens, writing_code
from megatext.config import ConfigError, from_dict


def kind_of(directory: Path) -> str | None:
    """The recipe that exported a directory, `cola_dlm` for one in that format; None for another Hugging Face model.
    Raises ConfigError for an unknown one."""
    from megatext.recipes.cola_format import is_cola_directory

    if is_cola_directory(directory):
        return "cola_dlm"
    kind = json.loads((directory / "config.json").read_text()).get("kind")
    if kind not in (None, "text_dit", "text_vae"):
        raise ConfigError(f"{directory}: exported by a recipe this version cannot write with ({kind})")
    return kind


def _library_hash(*packages: str) -> str:
    import megatext

    library = Path(megatext.__file__).parent
    return writing_code(Path(__file__), *(library / name for name in packages))


class TextDiffusion(System):
    """A latent diffusion model, through TextGenerator. A free length stops at the end of text. `sampling` is whole:
    what it does not say is SamplingConfig's default; where it is empty, it is the model's own."""

    def __init__(self, directory: Path, sampling: dict[str, Any], *, where: str, dtype: str, device: str) -> None:
        from megatext.recipes.cola_format import is_cola_directory
        from megatext.recipes.pretrained import read_description
        from megatext.recipes.sampling import SamplingConfig
        from megatext.training.cost import total_flops

        if "length" in sampling:
            raise ConfigError(f"{where}: length: how long texts are is one rule for all systems (--length)")
        self.weights = hash_of_model(directory)
        described = {} if is_cola_directory(directory) else read_description(directory, "text_dit")
        self.training_flops = total_flops(directory)
        self.started_from = described.get("warm_start_hash")
        self._directory, self._device, self._dtype = directory, device, dtype
        own: dict[str, Any] = described.get("config", {}).get("sampling", {})
        self._sampling = from_dict(SamplingConfig, sampling or own, where=where)
        self.sampled_by = {key: value for key, value in asdict(self._sampling).items() if key != "length"}

    def fingerprint(self) -> str:
        code = _library_hash("generation", "flow", "nn", "recipes")
        return hash_of(["text_dit", self.weights, asdict(self._sampling), self._dtype, code])

    @cached_property
    def generator(self) -> Any:
        """The loaded TextGenerator."""
        import torch

        from megatext.generation.text_generator import TextGenerator

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self._dtype]
        return TextGenerator.from_pretrained(self._directory, device=self._device, dtype=dtype)

    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        texts = self.generator.generate(
            [item.prefix for item in items],
            target_tokens=[own_tokens(item, self.generator.tokenizer) for item in items],
            seeds=[item_seed(seed, item) for item in items],
            sampling=self._sampling_of(items[0]),
        )
        return [Written(text) for text in texts]

    def trace(self, item: Item, seed: int) -> list[str]:
        tokens = own_tokens(item, self.generator.tokenizer)
        seed, sampling = item_seed(seed, item), self._sampling_of(item)
        return self.generator.trace(item.prefix, target_tokens=tokens, seed=seed, sampling=sampling)

    def check_likelihood(self, by: dict[str, Any], where: str) -> None:
        from megatext.generation import LikelihoodConfig

        if "first_seed" in by:
            raise ConfigError(f"{where}: first_seed is the run's (--seed)")
        from_dict(LikelihoodConfig, by, where=where)

    def log_likelihood(self, items: Sequence[Item], seed: int, **by: Any) -> list[Nats]:
        from megatext.generation import LikelihoodConfig

        prefixes, targets = [item.prefix for item in items], [item.target for item in items]
        found = self.generator.log_likelihood(prefixes, targets, LikelihoodConfig(first_seed=seed, **by))
        return [Nats(each.nats, list(each.estimates), each.estimator) for each in found]

    def _sampling_of(self, item: Item) -> Any:
        length: Literal["oracle", "eos"] = "eos" if item.length.policy == "free" else "oracle"
        return replace(self._sampling, length=length)


class Reconstruction(System):
    """A TextVAE: the human target through encoder (posterior mean) and decoder (likeliest token). No continuation, but
    what the decoder of a diffusion model in these latents loses at the least."""

    def __init__(self, directory: Path, device: str) -> None:
        self.weights = hash_of_model(directory)
        self._directory, self._device = directory, device

    def fingerprint(self) -> str:
        return hash_of(["text_vae", self.weights, _library_hash("nn")])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from megatext.recipes.pretrained import load_text_vae
        from megatext.tokenizer import load_tokenizer

        return load_text_vae(self._directory)[0].to(self._device), load_tokenizer(self._directory)

    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        return [Written(self._through(item.target)) for item in items]

    def _through(self, text: str) -> str:
        import torch

        vae, tokenizer = self._loaded
        ids = torch.tensor([tokenizer.encode(text)], device=self._device)
        if not ids.numel():
            return ""
        layout = vae.layout(torch.zeros_like(ids), torch.arange(ids.shape[1], device=ids.device)[None])
        with torch.inference_mode():
            written = vae.decode(vae.encode(ids, layout)[0], layout).argmax(dim=-1)[0]
        return tokenizer.decode(written.tolist())
