"""The two conventions of lightning_slopes."""

from __future__ import annotations

import pytest
import torch

import tokenmill as tm

PUBLISHED = {
    "minimax": lambda h, heads, l, layers: (
        2 ** (-8 * (h + 1) / heads) * (1 - l / (layers - 1) + 1e-5)
    ),
    "paper": lambda h, heads, l, layers: 8 / heads * (1 - l / layers) * h,
}


@pytest.mark.parametrize("convention", PUBLISHED)
def test_slopes_follow_the_published_formulas(convention):
    for layer in (0, 3, 7):
        found = tm.lightning_slopes(16, layer, 8, convention=convention)
        want = [PUBLISHED[convention](h, 16, layer, 8) for h in range(16)]
        torch.testing.assert_close(found, torch.tensor(want))
        assert found.dtype == torch.float32 and (found >= 0).all()


def test_slopes_between_powers_of_two_are_interpolated():
    eight, sixteen = tm.lightning_slopes(8), tm.lightning_slopes(16)
    assert torch.equal(tm.lightning_slopes(12), torch.cat([eight, sixteen[0::2][:4]]))
    assert torch.equal(tm.lightning_slopes(1), torch.tensor([2.0**-8]))
    torch.testing.assert_close(tm.lightning_slopes(8, 0, 1), eight * (1 + 1e-5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_heads: must be 1 to 65536; got 0"),
        ((2.5,), "num_heads: must be an integer; got 2.5"),
        ((4, 1), "num_layers: must be an integer, as its counterpart is given; got None"),
        ((4, 3, 3), "layer: must be from 0 to 2; got 3"),
        ((4, 0, 0), "num_layers: must be at least 1; got 0"),
    ],
)
def test_slopes_refuse(arguments, message):
    with pytest.raises(tm.InputError, match=message):
        tm.lightning_slopes(*arguments)
    with pytest.raises(tm.InputError, match="convention: must be 'minimax' or 'paper'"):
        tm.lightning_slopes(4, convention="alibi")
