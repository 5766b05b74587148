"""Scores of finished responses by the scorer of a reward block, outside of training.

Letters: B responses, R response length.
"""

import jax
import numpy as np

from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.rewards import scorers


def make(block, tokenizer, *, batch_size, key='reward'):
  """Creates the scorer of a reward block, on one device.

  Args:
    block: ConfigDict with the keys of scorers.config().
    tokenizer: Tokenizer of the policy that sampled the responses.
    batch_size: Number of responses that are scored at a time.
    key: Name of the block in messages.

  Returns:
    Function (Rollout of B responses, B formats.Prompt) -> scores [B], sums of rewards per token,
    NaN where the reward skips a response; and their parts {name: [B]}. It raises UserError if the
    sequences are too long for a reward model that reads their tokens.
  """
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  limits = []
  with jax.set_mesh(mesh):
    scorer, _ = scorers.make(
      block,
      tokenizer,
      mesh,
      load={'unroll': None},
      check=lambda model: limits.append(model.max_length),
      key=key,
    )

  def score(rollout, examples):
    length = rollout.tokens.shape[1]
    limit = min(limits, default=length)
    errors.need(
      length <= limit,
      f'prompts and responses of {length} tokens exceed the context of the reward model, '
      f'{limit} tokens: lower max_new_tokens',
    )
    totals, parts = [], []
    with jax.set_mesh(mesh):
      for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        batch = sharding.put_rows(jax.tree.map(lambda x: x[part], rollout), mesh)
        result = jax.device_get(types.Scores.of(scorer(batch, examples[part])))
        total = np.asarray(result.total)
        totals.append(total if total.ndim == 1 else total.sum(axis=1))
        parts.append(result.parts)
    return np.concatenate(totals), {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }

  return score
