"""Packed linear layers are linear layers."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from megatext.nn.packed import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (3, 5, 24), (70, 24), (0, 24), (2, 0, 24)])
def test_as_the_layer_was(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = x @ layer.weight.T + (layer.bias if bias else 0.0)
    pack_linears(layer)
    assert isinstance(layer, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach(), rtol=1e-5, atol=1e-5)
        if len(shape) == 3:
            torch.testing.assert_close(layer(x.transpose(0, 1)[::2]), expected.detach().transpose(0, 1)[::2])
    assert set(layer.state_dict()) == {"weight", "bias"} - ({"bias"} if not bias else set())


def test_gradients_are_those_of_the_weights() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(4, 6, requires_grad=True)
    pack_linears(layer)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(4, 6))


def test_what_becomes_of_a_packed_layer() -> None:
    """Copied, pickled, given other weights, moved or cast it is still the layer of its weights."""
    layer, x = nn.Linear(6, 3), torch.randn(4, 6)
    expected = layer(x).detach()
    pack_linears(layer)
    other = nn.Linear(6, 3)
    with torch.no_grad():
        for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert isinstance(copy, PackedLinear)
            torch.testing.assert_close(copy(x), expected)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        cast = layer.to(torch.float64)
        assert type(cast) is nn.Linear
        torch.testing.assert_close(cast(x.double()).float(), other(x))


def test_only_what_can_be_packed() -> None:
    class Own(nn.Linear):
        """Has a forward of its own, for all that is known."""

    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16), Own(4, 4), nn.LayerNorm(4))
    pack_linears(module)
    assert [type(child) for child in module] == [PackedLinear, nn.Linear, Own, nn.LayerNorm]
