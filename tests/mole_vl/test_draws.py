"""Chance that belongs to rows."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mole_vl.draws import chances, dropout, dropped, keys_of, keys_of_choices

SEEDS = torch.tensor([3, -7, 2**62 + 5, 3 + 2**40])


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    positions=st.integers(1, 5),
    more=st.integers(0, 3),
    width=st.integers(1, 9),
)
def test_a_rows_chance_hangs_on_nothing_beside_it(rows, positions, more, width):
    together = chances(keys_of(torch.tensor(rows), "layer", positions + more), width)
    for place, row in enumerate(rows):
        alone = chances(keys_of(torch.tensor([row]), "layer", positions), width)
        assert torch.equal(together[place, :positions], alone[0])


def test_rows_layers_positions_channels_and_choices_differ():
    first = chances(keys_of(SEEDS, "one", 64), 64)
    others = [
        chances(keys_of(SEEDS, "two", 64), 64),
        chances(keys_of_choices(keys_of(SEEDS, "one", 64), torch.ones(4, 64)), 64),
        chances(keys_of_choices(keys_of(SEEDS, "one", 64), torch.full((4, 64), 2)), 64),
        first.roll(1, 0),
        first.roll(1, 1),
        first.roll(1, 2),
        first.transpose(1, 2),
    ]
    # Of independent numbers the correlation is N(0, 1 / n).
    for other in others:
        both = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))
        assert abs(float(both[0, 1])) < 5 / math.sqrt(first.numel())


def test_chances_are_uniform():
    found = chances(keys_of(SEEDS, "layer", 200), 100).flatten()
    counts = torch.histc(found, 50, 0.0, 1.0)
    expected = len(found) / 50
    # Chi-squared of 49 degrees, five of its standard deviations above its mean.
    assert float((counts - expected).square().sum() / expected) < 49 + 5 * math.sqrt(98)
    assert float(found.min()) >= 0.0 and float(found.max()) < 1.0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_a_share_is_dropped_and_the_rest_makes_up_for_it(share):
    x = torch.randn(4, 60, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keys = keys_of(SEEDS, "layer", 60)
    y = dropped(x, share, keys)
    kept = (y != 0) | (x == 0)
    error = 5 * math.sqrt(max(share * (1 - share), 1e-9) / x.numel())
    assert abs(float(kept.float().mean()) - (1 - share)) <= error
    torch.testing.assert_close(y, torch.where(kept, x / (1 - share), 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - share))
    assert not dropped(x, 1.0, keys).any()


def test_without_seeds_torchs_own_generator_draws():
    x = torch.ones(2, 3, 50)
    torch.manual_seed(0)
    first = dropout(x, 0.5, None, "layer")
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5, None, "layer"), first)
    assert not torch.equal(dropout(x, 0.5, None, "layer"), first)
