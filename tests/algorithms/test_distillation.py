"""Distillation: divergences, what student and teacher read, and what the student learns."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import advantages as adv
from rlhf_jax import logprobs
from rlhf_jax import losses

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_gkd.npz')
CASES = json.loads(str(GOLDEN['settings']))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def divergence_by_loops(logits, teacher_logits, kind, beta):
  """Returns a divergence of two distributions, given as sequences of logits."""
  if kind == 'reverse_kl':
    return references.full_kl(logits, teacher_logits)
  if kind == 'forward_kl':
    return references.full_kl(teacher_logits, logits)
  total = 0.0
  student, teacher = references.log_softmax(logits), references.log_softmax(teacher_logits)
  for p, q in zip(map(math.exp, student), map(math.exp, teacher)):
    middle = beta * q + (1 - beta) * p
    total += beta * q * math.log(q / middle) + (1 - beta) * p * math.log(p / middle)
  return total


@pytest.mark.parametrize('chunk', [70, 28])
@pytest.mark.parametrize('kind', losses.DIVERGENCES)
def test_divergences_in_chunks_agree_with_loops(kind, chunk):
  """The student has width 3, the teacher width 4."""
  fn = jax.jit(
    lambda kernel, teacher_kernel, hidden, teacher_hidden: logprobs.compare(
      functools.partial(losses.divergence, kind=kind, beta=0.3),
      lambda h: h @ kernel,
      hidden,
      lambda h: h @ teacher_kernel,
      teacher_hidden,
      temperature=0.7,
      chunk=chunk,
    )
  )
  rng = np.random.default_rng(1)
  h, g, w, u = (
    rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 3), (2, 5, 4), (3, 7), (4, 7)]
  )
  p, q = (x.astype(np.float64) @ k.astype(np.float64) / 0.7 for x, k in [(h, w), (g, u)])
  expected = [
    divergence_by_loops(*rows, kind, 0.3) for rows in zip(p.reshape(10, 7), q.reshape(10, 7))
  ]
  close(fn(w, u, h, g).ravel(), expected)


def test_divergences_by_hand():
  """p = (1/2, 1/2) and q = (1/4, 3/4); with beta 1/2 the mixture is (3/8, 5/8)."""
  p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
  close(losses.divergence(p, q, kind='reverse_kl'), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
  close(losses.divergence(p, q, kind='forward_kl'), -0.25 * math.log(2) + 0.75 * math.log(1.5))
  teacher = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)  # KL(q || m)
  student = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)  # KL(p || m)
  close(losses.divergence(p, q, kind='jsd'), 0.5 * teacher + 0.5 * student)
  with pytest.raises(ValueError, match='tv'):
    losses.divergence(p, q, kind='tv')


@pytest.mark.parametrize('case', CASES)
def test_divergences_and_gradients_agree_with_trl(case):
  beta, temperature = CASES[case]['beta'], CASES[case]['temperature']
  kind = {0.0: 'forward_kl', 1.0: 'reverse_kl'}.get(beta, 'jsd')

  def loss(logits):
    scaled = logits / temperature, GOLDEN['teacher_logits'] / temperature
    return adv.masked_mean(losses.divergence(*scaled, kind=kind, beta=beta), GOLDEN['mask'])

  found, gradients = jax.jit(jax.value_and_grad(loss))(GOLDEN['logits'])
  close(found, GOLDEN[f'{case}/loss'])
  close(gradients, GOLDEN[f'{case}/gradients'])
