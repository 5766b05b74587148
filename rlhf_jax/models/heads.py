"""Heads on a backbone: values of a critic, scores of a reward model, the V and Q of ILQL.

A reward model may have several scalar heads, an ensemble on one backbone. V and Q are multilayer
perceptrons; a Q head has one output per token of the vocabulary.

Letters: B batch, T tokens, D width, M heads, N outputs.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers

RULES = (
  (r'head/kernel$', P(None)),
  (r'head/bias$', P()),
  # The hidden width 2 D is sharded: no mesh size may divide the vocabulary.
  (r'(^|/)(v|q1|q2)/up/kernel$', P('fsdp', 'tensor')),
  (r'(^|/)(v|q1|q2)/up/bias$', P('tensor')),
  (r'(^|/)(v|q1|q2)/down/kernel$', P(('fsdp', 'tensor'), None)),
  (r'(^|/)(v|q1|q2)/down/bias$', P()),
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


def init_mlp(key, width, outputs):
  """Returns new parameters of a head with one hidden layer, of twice the width.

  The shape is that of trlX's `make_head`, the initialization that of torch.nn.Linear: kernels and
  biases are uniform in +-1 / sqrt(inputs).

  Args:
    key: Random key.
    width: D.
    outputs: N.

  Returns:
    {'up': {'kernel': [D, 2 D], 'bias': [2 D]}, 'down': {'kernel': [2 D, N], 'bias': [N]}} float32.
  """
  keys = jax.random.split(key, 4)

  def linear(keys, inputs, outputs):
    uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-1.0) * inputs**-0.5
    return {'kernel': uniform(keys[0], (inputs, outputs)), 'bias': uniform(keys[1], (outputs,))}

  return {
    'up': linear(keys[:2], width, 2 * width),
    'down': linear(keys[2:], 2 * width, outputs),
  }


def mlp_features(head, hidden):
  """Computes the hidden layer of a head from `init_mlp`: relu(hidden @ up), [..., 2 D]."""
  up = head['up']
  x = layers.matmul(hidden, up['kernel'].astype(hidden.dtype))
  return jax.nn.relu(x + jnp.broadcast_to(up['bias'].astype(hidden.dtype), x.shape))


def mlp_outputs(head, features):
  """Computes the outputs [..., N] float32 of a head from its features [..., 2 D]."""
  down = head['down']
  x = layers.matmul(
    features, down['kernel'].astype(features.dtype), preferred_element_type=jnp.float32
  )
  return x + jnp.broadcast_to(down['bias'].astype(jnp.float32), x.shape)


def mlp_output_at(head, features, index):
  """Computes one output of a head per position, without those of the other tokens.

  Args:
    head: See `init_mlp`.
    features: [..., 2 D].
    index: [...] int32, the outputs to compute, below N.

  Returns:
    [...] float32.
  """
  columns = jnp.moveaxis(jnp.take(head['down']['kernel'], index, axis=1), 0, -1)
  picked = jnp.sum(features.astype(jnp.float32) * columns.astype(jnp.float32), axis=-1)
  return picked + head['down']['bias'].astype(jnp.float32)[index]


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
