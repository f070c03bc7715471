"""RankMe and spread of matrices whose spectrum is known."""

import math

import numpy as np
import pytest

from jaxseg.evaluate.rank import embedding_std, rankme


def with_spectrum(values, n=50, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(n, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return left * values @ right


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rankme_of_known_spectra(scale):
    assert rankme(scale * with_spectrum(np.ones(16))) == pytest.approx(16, rel=1e-4)
    assert rankme(scale * with_spectrum([1] + [0] * 15)) == pytest.approx(1, abs=1e-4)
    values = [8, 4, 2, 1, 1]
    entropy = -sum(v / 16 * math.log(v / 16) for v in values)
    assert rankme(scale * with_spectrum(values)) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_rankme_as_the_paper_s_formula():
    x = np.random.default_rng(0).normal(size=(40, 12)) ** 3
    values = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    p = values / values.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-sum(p * np.log(p))), rel=1e-5)


def test_rankme_of_nothing():
    assert rankme(np.zeros((5, 3))) == 0


def test_embedding_std_is_one_for_isotropic_and_zero_for_collapsed():
    x = np.random.default_rng(0).normal(size=(4000, 32))
    assert embedding_std(x) == pytest.approx(1, abs=0.02)
    assert embedding_std(x * np.linspace(1, 9, 4000)[:, None]) == pytest.approx(1, abs=0.02)
    assert embedding_std(np.tile(x[:1], (100, 1))) == pytest.approx(0, abs=1e-6)
    # Length alone does not vary on the sphere.
    assert embedding_std(x[:1] * np.linspace(1, 2, 100)[:, None]) == pytest.approx(0, abs=1e-6)
    assert 0.05 < embedding_std(x + 10) < 0.2


def test_features_that_cannot_be_used_are_named():
    bad = np.ones((4, 3))
    bad[2, 1] = np.nan
    for function in (rankme, embedding_std):
        with pytest.raises(ValueError, match="features: 1 of 4 rows hold NaN or infinity.*row 2"):
            function(bad)
        with pytest.raises(ValueError, match="have shape"):
            function(np.ones(5))
