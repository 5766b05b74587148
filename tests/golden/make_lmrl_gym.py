"""Golden numbers from LMRL-Gym's ILQL loss (https://github.com/abdulhaim/LMRL-Gym, JAX).

python make_lmrl_gym.py CHECKOUT

Writes lmrl_gym.npz beside this file: `ilql_loss` of LLM_RL/algorithms/ilql/base_interface.py with
its gradients, on episodes of several turns. CHECKOUT is a git checkout, of which this runs the two
functions of the loss alone, without the package's other imports. Needs jax and optax.

What is in the file. B episodes, T actions, V vocabulary; episodes may end early, or have no action.
  tokens, mask [B, T]           actions, and which of them are in the data
  rewards [B, T]
  v, q1, q2, target_q1, target_q2, q1_logits, q2_logits    inputs; the first five [B, T]
  settings                      gamma, tau, cql_weight
  loss, v_loss, q1_loss, q2_loss, q1_cql_loss, q2_cql_loss
  grad/NAME                     gradients of the loss by v and both q*_logits (q1 is read from them)
"""

import ast
import pathlib
import sys
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
import optax

B, T, V = 6, 9, 7
SETTINGS = {'gamma': 0.95, 'tau': 0.8, 'cql_weight': 0.05}


def load(checkout):
  """Returns `ilql_loss` of the checkout."""
  path = pathlib.Path(checkout) / 'LLM_RL/algorithms/ilql/base_interface.py'
  names = ('get_query_indicators', 'ilql_loss')
  tree = ast.parse(path.read_text())
  tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in names]
  scope = {'jax': jax, 'jnp': jnp, 'optax': optax, 'Any': Any, 'Tuple': tuple, 'Union': Union}
  scope['get_tensor_stats'] = lambda *args, **kwargs: {}
  exec(compile(tree, path, 'exec'), scope)
  return scope['ilql_loss']


def main(checkout):
  """Computes all numbers and writes the file."""
  ilql_loss = load(checkout)
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, T + 1, B)
  real = np.arange(T) < lengths[:, None]
  mask = real & (rng.random((B, T)) < 0.7)
  mask[2] = False
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  arrays = {
    'tokens': rng.integers(0, V, (B, T)),
    'mask': mask,
    'rewards': np.where(mask, normal(B, T), 0).astype(np.float32),
    'v': normal(B, T),
    'target_q1': normal(B, T),
    'target_q2': normal(B, T),
    'q1_logits': normal(B, T, V),
    'q2_logits': normal(B, T, V),
  }

  def loss(v, q1_logits, q2_logits):
    pick = lambda x: jnp.take_along_axis(x, jnp.asarray(arrays['tokens'])[..., None], 2)[..., 0]
    return ilql_loss(
      pick(q1_logits),
      pick(q2_logits),
      v,
      jnp.zeros(B),
      jnp.asarray(arrays['target_q1']),
      jnp.asarray(arrays['target_q2']),
      q1_logits,
      q2_logits,
      jnp.asarray(arrays['tokens']),
      jnp.asarray(real),
      jnp.asarray(mask),
      jnp.asarray(arrays['rewards']),
      **SETTINGS,
    )

  inputs = [jnp.asarray(arrays[name]) for name in ('v', 'q1_logits', 'q2_logits')]
  (total, logs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
  found = arrays | {'loss': total, 'settings': np.float32(list(SETTINGS.values()))}
  found |= {name: logs['losses'][name] for name in logs['losses'] if name != 'total_loss'}
  found |= {f'grad/{name}': x for name, x in zip(('v', 'q1_logits', 'q2_logits'), gradients)}
  found = {name: np.asarray(x) for name, x in found.items()}
  np.savez_compressed(pathlib.Path(__file__).with_name('lmrl_gym.npz'), **found)


if __name__ == '__main__':
  main(sys.argv[1])
