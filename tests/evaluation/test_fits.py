"""Fits of Gao et al.'s curves: exact points, points with noise against scipy, and peaks by grid."""

import math

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax import errors
from rlhf_jax.evaluation import fits

CURVES = {
  'best_of_n': lambda d, alpha, beta: d * (alpha - beta * d),
  'rl': lambda d, alpha, beta: d * (alpha - beta * np.log(d)),
}


@pytest.mark.parametrize('form', fits.FORMS)
def test_exact_points_give_back_the_curve(form):
  d = np.array([0.0, 0.3, 1.0, 2.5, 4.0])  # R(0) = 0 says nothing about the curve
  found = fits.fit(form, d, np.concatenate([[7.0], CURVES[form](d[1:], 1.2, 0.4)]))
  assert (found.alpha, found.beta, found.r2) == pytest.approx((1.2, 0.4, 1.0), abs=1e-9)
  assert found.points == 4 and found.alpha_se < 1e-9
  grid = np.linspace(1e-3, 20, 200_001)
  values = CURVES[form](grid, 1.2, 0.4)
  np.testing.assert_allclose(found(grid), values, rtol=1e-9, atol=1e-9)
  assert found.peak == pytest.approx(grid[values.argmax()], abs=1e-3)
  assert found.highest == pytest.approx(values.max(), rel=1e-6)
  assert found([0.0]) == 0


def test_two_points_by_hand():
  # d = 1: alpha = 2. d = e: e (alpha - beta) = e, so beta = 1. The peak is at exp(2 / 1 - 1) = e.
  found = fits.fit('rl', [1.0, math.e], [2.0, math.e])
  assert (found.alpha, found.beta, found.peak, found.highest) == pytest.approx(
    (2, 1, math.e, math.e)
  )
  assert math.isnan(found.alpha_se)
  # d = 1: alpha - beta = 1. d = 2: 2 alpha - 4 beta = 0. So alpha = 2 and beta = 1, the peak at 1.
  found = fits.fit('best_of_n', [1.0, 2.0], [1.0, 0.0])
  assert (found.alpha, found.beta, found.peak, found.highest) == pytest.approx((2, 1, 1, 1))


@pytest.mark.parametrize('form', fits.FORMS)
def test_noisy_points_against_scipy(form):
  rng = np.random.default_rng(0)
  d = rng.uniform(0.2, 5, 30)
  r = CURVES[form](d, 1.0, 0.3) + rng.normal(0, 0.2, 30)
  found = fits.fit(form, d, r)
  expected, covariance = optimize.curve_fit(CURVES[form], d, r)
  np.testing.assert_allclose([found.alpha, found.beta], expected, rtol=1e-5)
  np.testing.assert_allclose(
    [found.alpha_se, found.beta_se], np.sqrt(np.diag(covariance)), rtol=1e-4
  )
  residual = sum((y - CURVES[form](x, *expected)) ** 2 for x, y in zip(d, r))
  assert found.r2 == pytest.approx(1 - residual / sum((y - r.mean()) ** 2 for y in r), rel=1e-6)
  assert 0.3 < found.r2 < 1


@pytest.mark.parametrize('form', fits.FORMS)
def test_scores_that_only_rise_have_no_peak(form):
  found = fits.fit(form, [1.0, 2.0, 3.0], [1.0, 5.0, 12.0])
  assert found.beta < 0 and math.isinf(found.peak) and math.isinf(found.highest)


def test_a_curve_needs_two_distances():
  with pytest.raises(errors.UserError, match='two or more different distances above 0.* are 1'):
    fits.fit('rl', [0.0, 1.0, 1.0], [0.0, 1.0, 1.1])
