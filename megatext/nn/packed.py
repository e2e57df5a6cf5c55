"""Linear layers for writing on a CPU, where a pass has few rows.

MKL multiplies 2 to 8 rows in float32 some ten times slower than one row, though all read the same weights; oneDNN on
weights in its own order takes two to three times one row (a profile on an AMD EPYC, Zen 3). Where blocks are small,
that is what a text costs (`benchmarks/sampling.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """nn.Linear with a second copy of its weights, in oneDNN's order; for inference, without gradient."""

    packed: Tensor

    def pack(self) -> None:
        """Copy the weights as they are now. To be called again where they are changed in place."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x float32 `[..., in_features]` -> `[..., out_features]`, as nn.Linear up to rounding. One row alone is faster
        on the weights as they are."""
        if torch.is_grad_enabled() or x.numel() == x.shape[-1] or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moved or cast it is a plain layer again."""
        super()._apply(fn, recurse)
        del self.packed
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold oneDNN's tensors."""
        return {key: value for key, value in self.__dict__.items() if key != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


def pack_linears(module: nn.Module) -> None:
    """Make the float32 linear layers on the CPU packed ones, where torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
            child.__class__ = PackedLinear
            assert isinstance(child, PackedLinear)
            child.pack()
