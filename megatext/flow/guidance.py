"""Classifier-free guidance: how two predictions combine, and at which timesteps the second is worth its price."""

from torch import Tensor


def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale (conditional - unconditional): 0 ignores the condition, 1 is no guidance.

    Holds alike for velocities, clean latents and noise (all are affine in each other at a given z and t) and for
    logits, where it sharpens the ratio of the two distributions.
    """
    return unconditional + scale * (conditional - unconditional)


def active(t: float, scale: float, interval: tuple[float, float]) -> bool:
    """Whether a step at t needs the unconditional pass: the scale is not 1, and t lies in the closed interval."""
    return scale != 1.0 and interval[0] <= t <= interval[1]
