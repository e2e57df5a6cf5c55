"""Linear layers for writing on a CPU, where a pass has few rows.

MKL multiplies 2 to 8 rows in float32 some ten times slower than one row, though all read the same weights; oneDNN on
weights in its own order takes two to three times one row (`benchmarks/sampling.py`). Where blocks are small, that is
what a text costs.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """nn.Linear with a second copy of its weights, in oneDNN's order; for inference, without gradient."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, up to rounding. One row alone is faster on the weights as they are."""
        if torch.is_grad_enabled() or x.numel() == x.shape[-1] or x.device.type != "cpu":
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def pack_linears(module: nn.Module) -> None:
    """Make the float32 linear layers on the CPU packed ones, where torch has oneDNN. Their weights must not change
    afterwards; they take their memory twice."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
            child.__class__ = PackedLinear
            assert isinstance(child, PackedLinear)
            child.packed = torch.ops.mkldnn._reorder_linear_weight(child.weight.detach())
