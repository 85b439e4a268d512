"""Sets the graph of a fitted transformer against its own ``transform``."""

import numpy as np

from converters.signature import by_position
from tests.support import lowered


def wanted(fitted, rows):
    """What ``fitted`` makes of the rows once they are float32, dense and as float64."""
    with by_position():
        made = fitted.transform(rows.astype(np.float32).astype(np.float64))
    return np.asarray(made.toarray() if hasattr(made, "toarray") else made, np.float64)


def assert_same(fitted, rows, *, rtol=0.0, atol=0.0):
    """Equal bit for bit, NaN included, unless a tolerance is given; also one by one, and for no row."""
    expected = wanted(fitted, rows)
    found = lowered.transform(fitted, rows)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    singles = np.concatenate([lowered.transform(fitted, rows[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(singles, expected[:3], rtol=rtol, atol=atol)
    assert lowered.transform(fitted, rows[:0]).shape == (0, expected.shape[1])


def hostile(rows):
    """The rows as float32, the neighbours of their values, far ones, tiny ones, zeros and integers."""
    narrow = rows.astype(np.float32)
    return np.vstack(
        [
            narrow,
            np.nextafter(narrow, np.float32(np.inf)),
            np.nextafter(narrow, np.float32(-np.inf)),
            narrow * 1.5,
            -narrow,
            narrow[:5] * 1e6,
            narrow[:5] * 1e-40,
            np.zeros_like(narrow[:1]),
            np.rint(narrow[:20]),
        ]
    ).astype(np.float64)


def holes(rows, share=0.1):
    """The rows with NaN in a share of their cells."""
    rows = rows.copy()
    rows[np.random.default_rng(1).random(rows.shape) < share] = np.nan
    return rows
