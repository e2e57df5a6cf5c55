"""Attention rules against their definitions, written out token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatext.nn.layout import CONTEXT, PADDING, Layout, allowed

RULES = {
    "full": lambda q, k: True,
    "prefix": lambda q, k: q["role"] != CONTEXT or k["role"] == CONTEXT,
    "causal": lambda q, k: k["position"] <= q["position"],
    "block_causal": lambda q, k: k["block"] <= q["block"],
    "two_stream": lambda q, k: (
        (k["role"] == CONTEXT and k["block"] <= q["block"])
        if q["role"] == CONTEXT
        else (k["role"] == CONTEXT and k["block"] < q["block"]) or (k["role"] == q["role"] and k["block"] == q["block"])
    ),
}


@pytest.mark.parametrize("rule", sorted(RULES))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rule_equals_its_definition(rule: str, data: st.DataObject) -> None:
    tokens, names = 9, ("segment", "position", "role", "block")

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.tensor([data.draw(st.lists(st.integers(low, high), min_size=tokens, max_size=tokens))])

    layout = Layout(draw(-1, 2), draw(0, 5), draw(0, 2), draw(0, 3))
    mask = allowed(rule, layout, layout)[0]
    for i in range(tokens):
        for j in range(tokens):
            q, k = ({n: int(getattr(layout, n)[0, x]) for n in names} for x in (i, j))
            if q["segment"] == PADDING or k["segment"] == PADDING:
                expected = q["segment"] == k["segment"]
            else:
                expected = q["segment"] == k["segment"] and RULES[rule](q, k)
            assert bool(mask[i, j]) == expected, (rule, i, j)


def test_separated_roles_are_segments_of_their_own() -> None:
    layout = Layout.of(
        torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[0, 1, 0, 1, 0]]), torch.tensor([[0, 1, 0, 1, 0]])
    )
    assert layout.separated().segment.tolist() == [[0, 1, 2, 3, -1]]
