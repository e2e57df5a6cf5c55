"""Paths between data and noise, z_t = alpha(t) x0 + sigma(t) noise, with t = 0 clean data and t = 1 pure noise.

Every function is elementwise in `t`: a scalar, one value a row, or one a token ([rows, tokens]); missing
trailing dimensions are added, so `t [rows, tokens]` goes with `z [rows, tokens, channels]`.

The identities below hold for any differentiable path. With v = dz/dt = alpha' x0 + sigma' noise and the
Wronskian w = alpha sigma' - sigma alpha', which is positive on every path here, x0 and noise follow from
(z, v) at every t. From (z, x0) noise and velocity are lost at t = 0, from (z, noise) x0 is lost at t = 1:
there a conversion returns inf or nan, and a caller has no business asking.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatext.config import ConfigError


def match(coefficient: Tensor, z: Tensor) -> Tensor:
    """`coefficient` with trailing singleton dimensions appended until it broadcasts over `z`."""
    return coefficient.reshape(coefficient.shape + (1,) * (z.ndim - coefficient.ndim))


class Path(ABC):
    """alpha, sigma, their derivatives in t, and the conversions between velocity, x0 and noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data: exactly 1 at t = 0 and exactly 0 at t = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise: exactly 0 at t = 0 and exactly 1 at t = 1."""

    @abstractmethod
    def alpha_derivative(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_derivative(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time_of_snr(self, snr: Tensor) -> Tensor:
        """The t at which (alpha / sigma)^2 is `snr`, >= 0: 1 at 0, towards 0 as it grows."""

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t."""
        return match(self.alpha(t), x0) * x0 + match(self.sigma(t), x0) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dz/dt along the path, the target of velocity prediction."""
        return match(self.alpha_derivative(t), x0) * x0 + match(self.sigma_derivative(t), x0) * noise

    def x0_from_velocity(self, z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        w = match(self.wronskian(t), z)
        return (match(self.sigma_derivative(t), z) * z - match(self.sigma(t), z) * velocity) / w

    def noise_from_velocity(self, z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        w = match(self.wronskian(t), z)
        return (match(self.alpha(t), z) * velocity - match(self.alpha_derivative(t), z) * z) / w

    def noise_from_x0(self, z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Needs t > 0."""
        return (z - match(self.alpha(t), z) * x0) / match(self.sigma(t), z)

    def velocity_from_x0(self, z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Needs t > 0."""
        return self.velocity(x0, self.noise_from_x0(z, x0, t), t)

    def x0_from_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Needs t < 1."""
        return (z - match(self.sigma(t), z) * noise) / match(self.alpha(t), z)

    def velocity_from_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Needs t < 1."""
        return self.velocity(self.x0_from_noise(z, noise, t), noise, t)

    def wronskian(self, t: Tensor) -> Tensor:
        """alpha sigma' - sigma alpha' > 0."""
        return self.alpha(t) * self.sigma_derivative(t) - self.sigma(t) * self.alpha_derivative(t)


@dataclass(frozen=True)
class Linear(Path):
    """z_t = (1 - t) x0 + t noise; the velocity is noise - x0 at every t (rectified flow, TextLDM Eq. 4)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_snr(self, snr: Tensor) -> Tensor:
        return 1 / (1 + snr.sqrt())


@dataclass(frozen=True)
class TanD(Path):
    """Variance-preserving path of LDLM and TEncDM: alpha = 1 / sqrt(1 + d^2 tan^2(pi t / 2)), alpha^2 + sigma^2 = 1.

    It is a turn by the angle phi with tan(phi) = d tan(pi t / 2): alpha = cos(phi), sigma = sin(phi). A larger d
    spends more of t at high noise. Written in sine and cosine because the tangent is infinite at t = 1.
    """

    d: float
    """Shift towards noise, > 0; 1 is the cosine schedule, the papers use 3 to 7."""

    def __post_init__(self) -> None:
        if not (self.d > 0 and math.isfinite(self.d)):
            raise ConfigError(f"tan-d path: d must be positive and finite, got {self.d}")

    def _turn(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, d phi / dt)."""
        # cos(pi t / 2) as the sine of the complement: exactly 0 at t = 1 also in float32
        c, s = torch.sin(math.pi / 2 * (1 - t)), self.d * torch.sin(math.pi / 2 * t)
        r = torch.sqrt(c * c + s * s)
        return c / r, s / r, (math.pi / 2 * self.d) / (r * r)

    def alpha(self, t: Tensor) -> Tensor:
        return self._turn(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._turn(t)[1]

    def alpha_derivative(self, t: Tensor) -> Tensor:
        _, sigma, turn = self._turn(t)
        return -sigma * turn

    def sigma_derivative(self, t: Tensor) -> Tensor:
        alpha, _, turn = self._turn(t)
        return alpha * turn

    def time_of_snr(self, snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(torch.ones_like(snr), self.d * snr.sqrt())


def path_from_name(name: str) -> Path:
    """ "linear", or "tan-D" with a positive number, as in "tan-3"."""
    if name == "linear":
        return Linear()
    if turn := re.fullmatch(r"tan-(\d+\.?\d*)", name):
        return TanD(float(turn[1]))
    raise ConfigError(f'unknown path "{name}": write "linear", or "tan-D" with a positive number such as "tan-3"')
