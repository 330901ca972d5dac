"""Which example a row of the global batch is."""

import numpy as np
import pytest

from mole_vl.training.rows import Alike, Row, rows_of_step


def picked(n, rows, steps, sizes=None, seed=3):
    """The examples of each step."""
    alike = Alike(sizes) if sizes is not None else None
    return [
        [alike.pick(row) if alike else row.pick(n) for row in rows_of_step(seed, step, rows)]
        for step in range(steps)
    ]


@pytest.mark.parametrize(("n", "rows"), [(12, 4), (13, 4), (3, 4), (7, 7), (450, 4), (1, 3)])
def test_alike_shows_every_example_once_an_epoch(n, rows):
    sizes = np.random.default_rng(0).integers(1, 100, n)
    steps = 3 * n // rows + 1
    order = [one for step in picked(n, rows, steps, sizes) for one in step]
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order != sorted(order) or n == 1
    assert picked(n, rows, steps, sizes) == picked(n, rows, steps, sizes)
    if n > rows:
        assert picked(n, rows, steps, sizes, seed=4) != picked(n, rows, steps, sizes)


@pytest.mark.parametrize("n", [400, 403])
def test_alike_batches_hold_examples_of_like_size_in_no_order(n):
    sizes = np.random.default_rng(1).permutation(n)
    rows = 4
    steps = 3 * n // rows
    batches = [sizes[batch] for batch in picked(n, rows, steps, sizes)]
    spread = [int(np.ptp(batch)) for batch in batches]
    # 50 batches of a pool: neighbours in it are two sizes apart, a whole batch eight or so.
    assert sorted(spread)[len(spread) * 9 // 10] <= 16
    assert sum(one > 40 for one in spread) <= 3
    plain = [int(np.ptp(sizes[batch])) for batch in picked(n, rows, steps)]
    assert np.median(plain) > 10 * np.median(spread)
    means = [batch.mean() for batch in batches]
    assert abs(np.corrcoef(means[:50], range(50))[0, 1]) < 0.5


def test_a_row_alone_is_the_row_in_its_batch():
    sizes = list(range(20))
    whole = picked(20, 4, 12, sizes)
    assert Alike(sizes).pick(Row(3, 11, 2, 4)) == whole[11][2]
    back = Alike(sizes)
    assert [back.pick(Row(3, step, 0, 4)) for step in (11, 0, 5)] == [
        whole[step][0] for step in (11, 0, 5)
    ]
