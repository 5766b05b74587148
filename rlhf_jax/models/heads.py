"""Scalar heads on a backbone: values of a critic, scores of a reward model.

Letters: B batch, T tokens, D width.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

RULES = (
  (r'head/kernel$', P(None)),
  (r'head/bias$', P()),
)


def init_scalar(key, width, *, scale):
  """Returns new parameters of a scalar head.

  Args:
    key: Random key; may be None if `scale` is 'zero'.
    width: D.
    scale: 'zero', so that values start at 0 (a value head on the policy's hidden states), or
      'normal', N(0, 1 / (D + 1)) with the variance second (a reward head, as in the code of
      Ziegler et al. 2019, https://github.com/openai/lm-human-preferences).

  Returns:
    {'kernel': [D], 'bias': []} float32.
  """
  if scale not in ('zero', 'normal'):
    raise ValueError(f"scale is {scale!r}; it must be 'zero' or 'normal'")
  kernel = (
    jnp.zeros(width) if scale == 'zero' else jax.random.normal(key, (width,)) * (width + 1) ** -0.5
  )
  return {'kernel': kernel, 'bias': jnp.zeros(())}


def apply_scalar(head, hidden):
  """Computes one number per position.

  Args:
    head: Parameters, see `init_scalar`.
    hidden: Hidden states [..., D] of any float dtype.

  Returns:
    [...] float32.
  """
  return hidden.astype(jnp.float32) @ head['kernel'].astype(jnp.float32) + head['bias'].astype(
    jnp.float32
  )


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
