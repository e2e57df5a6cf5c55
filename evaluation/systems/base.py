"""The protocol that everything which writes a continuation follows."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import megatext
from evaluation.files import hash_of_code
from megatext.config import ConfigError
from megatext.rng import derive_seed
from megatext.tokenizer import Tokenizer


@dataclass(frozen=True)
class Length:
    """How long continuations are: one rule for all systems of a table."""

    policy: Literal["oracle", "fixed", "free"] = "oracle"
    """`oracle`: as many of the system's own tokens as the human target has, no end of text. `fixed`: `tokens` of them,
    no end of text. `free`: until the end of text, at most `tokens`."""
    tokens: int | None = None
    """Of the system's own; for fixed and free."""

    def __post_init__(self) -> None:
        if (self.policy == "oracle") != (self.tokens is None):
            raise ConfigError(f"length {self.policy}: write oracle, fixed:TOKENS or free:TOKENS")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"length {self.policy}:{self.tokens}: needs at least one token")

    @staticmethod
    def parse(text: str) -> "Length":
        """`oracle`, `fixed:TOKENS` or `free:TOKENS`."""
        policy, colon, tokens = text.partition(":")
        if policy not in ("oracle", "fixed", "free") or (colon and not tokens.isdigit()):
            raise ConfigError(f"length {text}: write oracle, fixed:TOKENS or free:TOKENS")
        return Length(policy, int(tokens) if colon else None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Item:
    """One text to write."""

    id: str
    """Of the sample; for an unconditional passage its number."""
    prefix: str
    """"" for an unconditional passage."""
    target: str
    """What the human wrote; with the length rule `oracle` a system may count its tokens, nothing else."""
    length: Length
    """How long the text is to be."""


@dataclass(frozen=True)
class Written:
    """One text, as a system wrote it."""

    text: str
    """The continuation without its prefix."""
    ids: list[int] | None = None
    """Token ids where decoding and encoding again would change them (shuffled tokens), of `System.ids_tokenizer`."""
    prefix_cut: int = 0
    """Tokens that were left out at the start of the prefix because the system does not read more."""


@dataclass(frozen=True)
class Nats:
    """What a target costs after its prefix."""

    nats: float
    """-log p(target | prefix), or an upper bound on it."""
    estimates: list[float]
    """Those that it is the mean of, one a seed of the estimator; [] where it is exact."""
    estimator: str
    """`exact`, or the name of the bound."""


class System(ABC):
    """Something ready to write. A text is a function of (fingerprint, item, seed) but for rounding: it does not depend
    on what is written beside it."""

    weights: str | None = None
    """hash_of_model of the directory; None without one."""
    started_from: str | None = None
    """weights_hash of the model that this one's training started from; None where it started from random weights."""
    sampled_by: dict[str, Any] | None = None
    """All that it samples by, what its row left to defaults or to the model too; None where nothing tells."""
    training_flops: float | None = None
    """Of its training and of all that it stands on, where an export tells them."""
    timed: bool = True
    """Whether seconds per text mean anything."""
    ids_tokenizer: str | None = None
    """Fingerprint of the tokenizer of Written.ids."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What writes, by content (weights, tokenizer, sampling, code): two of one fingerprint write the same."""

    @abstractmethod
    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        """One text for each item. Equal seeds give equal texts."""

    def trace(self, item: Item, seed: int) -> list[str]:
        """What an item's text reads like after every step; [] where there are no steps."""
        return []

    def check_likelihood(self, by: dict[str, Any], where: str) -> None:
        """Raise ConfigError where likelihoods cannot be estimated so."""
        raise ConfigError(f"{where}: only a diffusion model's likelihood is estimated; leave it out")

    def log_likelihood(self, items: Sequence[Item], seed: int, **by: Any) -> list[Nats]:
        """Of each item's target, estimated `by` what a row says. Raises ConfigError where the system has none."""
        raise ConfigError(f"{type(self).__name__} has no likelihood; leave `likelihood` out of its row")


def writing_code(*paths: Path) -> str:
    """Hash of the code that decides a text: what is given, and what all systems share (lengths, seeds, tokenizers)."""
    library = Path(megatext.__file__).parent
    return hash_of_code(Path(__file__), library / "rng.py", library / "tokenizer.py", *paths)


def own_tokens(item: Item, tokenizer: Tokenizer) -> int:
    """How many of a system's own tokens an item may have, at least 1."""
    return item.length.tokens or max(1, len(tokenizer.encode(item.target)))


def item_seed(seed: int, item: Item) -> int:
    """A 63-bit seed of one text from the run's seed, so that it depends on no other text."""
    purpose = "evaluation continuation" if item.prefix else "evaluation unconditional"
    return derive_seed(seed, purpose, int(hashlib.sha256(item.id.encode()).hexdigest()[:15], 16))
