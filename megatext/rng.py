"""Counter-based randomness: every draw is a pure function of (seed, purpose, counters).

Nothing here has state that a checkpoint would have to save. A resumed run, another number of ranks or
another micro-batch size asks for the same (seed, purpose, step, row) and gets the same bits, because
noise, timesteps, splits and dropout belong to the sample and not to the process that happens to hold it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

_MASK_63 = (1 << 63) - 1


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed from the run's seed, a purpose ("noise", "timestep", ...) and integer counters."""
    key = f"{seed}|{purpose}|{'|'.join(str(int(c)) for c in counters)}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK_63


def generator(seed: int, purpose: str, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose; about 15 µs. CPU and CUDA streams of one seed differ."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *counters))


def uniform(seed: int, purpose: str, counters: Sequence[int] | np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each counter (splitmix64 of seed and counter), vectorised."""
    base = np.uint64(derive_seed(seed, purpose))
    with np.errstate(over="ignore"):
        z = base + np.asarray(counters).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def on_device(values: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """The array as a tensor; its way to a GPU does not make the host wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


def normal(
    seed: int,
    purpose: str,
    counters: Sequence[int] | np.ndarray,
    shape: tuple[int, ...],
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Standard normal float32 `[len(counters), *shape]`; row i depends on counters[i] alone."""
    rows = [
        torch.randn(shape, generator=generator(seed, purpose, int(c), device=device), device=device) for c in counters
    ]
    return torch.stack(rows) if rows else torch.empty((0, *shape), device=device)
