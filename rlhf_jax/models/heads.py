"""Scalar heads on a backbone: values of a critic, scores of a reward model.

A reward model may have several heads, an ensemble on one backbone.

Letters: B batch, T tokens, D width, M heads.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

RULES = (
  (r'head/kernel$', P(None)),
  (r'head/bias$', P()),
)


def init_scalar(key, width, *, scale, count=1):
  """Returns new parameters of a scalar head, or of several.

  Args:
    key: Random key; may be None if `scale` is 'zero'.
    width: D.
    scale: 'zero', so that values start at 0 (a value head on the policy's hidden states), or
      'normal', N(0, 1 / (D + 1)) with the variance second (a reward head, as in the code of
      Ziegler et al. 2019, https://github.com/openai/lm-human-preferences).
    count: M.

  Returns:
    {'kernel': [D], 'bias': []} float32; {'kernel': [D, M], 'bias': [M]} for several heads.
  """
  if scale not in ('zero', 'normal'):
    raise ValueError(f"scale is {scale!r}; it must be 'zero' or 'normal'")
  several = () if count == 1 else (count,)
  kernel = jnp.zeros((width, *several))
  if scale == 'normal':
    kernel = jax.random.normal(key, kernel.shape) * (width + 1) ** -0.5
  return {'kernel': kernel, 'bias': jnp.zeros(several)}


def apply_scalar(head, hidden):
  """Computes one number per position and head.

  Args:
    head: Parameters, see `init_scalar`.
    hidden: Hidden states [..., D] of any float dtype.

  Returns:
    [...] float32; [..., M] for several heads.
  """
  values = hidden.astype(jnp.float32) @ head['kernel'].astype(jnp.float32)
  return values + jnp.broadcast_to(head['bias'].astype(jnp.float32), values.shape)


def count(head):
  """Returns the number of heads, M."""
  return head['bias'].size


def mean(head):
  """Returns the one head whose values are the mean of the values of several."""
  if not head['bias'].ndim:
    return head
  return {'kernel': jnp.mean(head['kernel'], axis=1), 'bias': jnp.mean(head['bias'])}


def last_token(values, mask):
  """Returns the value at the last real token of each sequence, wherever the padding is.

  Args:
    values: [B, T, ...].
    mask: [B, T] bool. A sequence that is all padding gives the value at its last position.

  Returns:
    [B, ...].
  """
  from_end = jnp.argmax(mask[:, ::-1], axis=1)
  last = mask.shape[1] - 1 - from_end
  return jax.vmap(lambda row, index: row[index])(values, last)
