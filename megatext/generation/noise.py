"""What is asked for, and the randomness it gets: a function of each request's own seed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatext import rng


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, how many to generate after it, and the seed of its noise."""

    prompt: list[int]
    target_tokens: int
    seed: int
    given_at: tuple[int, ...] | None = None
    """Positions of the prompt's tokens, ascending, where what is to be generated does not just follow them."""

    def places(self) -> tuple[list[int], list[int]]:
        """Positions of the prompt's tokens, and of those that are to be generated."""
        given = list(range(len(self.prompt)) if self.given_at is None else self.given_at)
        taken = set(given)
        return given, [place for place in range(len(given) + self.target_tokens) if place not in taken]


class Noise:
    """Draws for some rows of columns. Row r is a function of (seed, block) of its request, whatever stands beside it.

    `spans` are each row's columns [first, last) that are generated; the draws of the others are zero."""

    def __init__(
        self, requests: list[Request], blocks: list[int], spans: list[tuple[int, int]], device: torch.device
    ) -> None:
        self._generators = [rng.generator(r.seed, "generation", b) for r, b in zip(requests, blocks, strict=True)]
        self._spans, self._device = spans, device
        self._columns = max(1, *(last for _, last in spans))

    def normal(self, channels: int) -> Tensor:
        """Standard normal float32 `[rows, columns, channels]`, drawn on the CPU: the same on every device."""
        return self._draw((channels,), torch.randn)

    def uniform(self) -> Tensor:
        """float32 `[rows, columns]` in [0, 1)."""
        return self._draw((), torch.rand)

    def _draw(self, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        out = torch.zeros(len(self._generators), self._columns, *shape)
        for row, (generator, (first, last)) in enumerate(zip(self._generators, self._spans, strict=True)):
            out[row, first:last] = draw((last - first, *shape), generator=generator)
        return out.to(self._device)


def draw_tokens(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Tokens `[rows, columns]` from softmax(logits / temperature) `[rows, columns, vocab]`, by inverting its
    distribution function at u `[rows, columns]`; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits / temperature, dim=-1).double().cumsum(dim=-1)
    # right: a token of no probability is not drawn even at u = 0
    found = torch.searchsorted(cumulative, u[..., None].double() * cumulative[..., -1:], right=True)[..., 0]
    return found.clamp(max=logits.shape[-1] - 1)
