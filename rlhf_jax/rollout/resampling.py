"""Dynamic sampling: groups of responses that teach nothing are replaced by groups of new prompts.

See DAPO, §3.2 (https://arxiv.org/abs/2503.14476). Every attempt samples a whole batch, in the
shapes of the first, so nothing compiles again. Its good groups fill the places of wasted ones in
order; what is left over is discarded, as in DAPO.

Letters: B batch, n responses per prompt, R response length.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree
import numpy as np

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.rollout import actor as actor_lib


@dataclasses.dataclass(frozen=True)
class Resampling:
  """When to sample groups again.

  Attributes:
    is_wasted: (Rollout, scores [B] or [B, R]) -> [B] bool, responses of groups to replace, with one
      value for all n responses of a group.
    limit: Largest number of attempts after the first. Groups that are still wasted then stay.
  """

  is_wasted: Callable[[types.Rollout, types.ScoreArray], Bool[Array, ' B']]
  limit: int


def sample(
  actor: actor_lib.Actor,
  params: PyTree,
  key: Key[Array, ''],
  *,
  timed: bool,
  next_key: Key[Array, ''] | None = None,
  resampling: Resampling,
) -> tuple[types.Rollout, types.ScoreArray, dict[str, float]]:
  """Samples and scores batches until no group is wasted, or the limit is reached.

  Attempt i > 0 takes the next prompts and samples with `fold_in(key, i)`, so a resumed run samples
  the same. The reward reads every response once.

  Args:
    actor: Actor, whose last batch becomes the result.
    params: All parameters of the policy.
    key: Random key of this rollout.
    timed: Whether to measure times, which are summed over the attempts.
    next_key: See Actor.
    resampling: Resampling.

  Returns:
    What the Actor returns; if `timed` with the number of attempts, groups/attempts.
  """
  rollout, scores, metrics = actor(params, key, timed=timed, next_key=next_key)
  wasted, attempts = processes.to_host(resampling.is_wasted(rollout, scores)), 1
  while wasted.any() and attempts <= resampling.limit:
    examples, for_scoring, parts = actor.last_batch
    again, new_scores, new_metrics = actor(
      params,
      jax.random.fold_in(key, attempts),
      timed=timed,
      next_key=None if next_key is None else jax.random.fold_in(next_key, attempts),
    )
    new_wasted = processes.to_host(resampling.is_wasted(again, new_scores))
    index = fill(wasted, new_wasted)
    wasted = np.concatenate([wasted, new_wasted])[index]
    new_examples, *new = actor.last_batch
    rollout, for_scoring, parts = _take(
      (rollout, for_scoring, parts), (again, new[0], new[1]), index
    )
    both = [*examples, *new_examples]
    actor.last_batch = [both[i] for i in index], for_scoring, parts
    scores, attempts = parts.total, attempts + 1
    metrics = _sum_times(metrics, new_metrics) | actor_lib.mean_parts(parts) if timed else {}
  return rollout, scores, metrics | ({'groups/attempts': attempts} if timed else {})


def fill(
  wasted: Bool[np.ndarray, ' B'], new_wasted: Bool[np.ndarray, ' B']
) -> Int[np.ndarray, ' B']:
  """Returns where to take each response from: below B from the old batch, else from the new one.

  Args:
    wasted: [B] bool, responses to replace, in whole groups.
    new_wasted: [B] bool, the same for the new batch.
  """
  index = np.arange(len(wasted))
  places, good = np.flatnonzero(wasted), np.flatnonzero(~new_wasted)
  count = min(len(places), len(good))
  index[places[:count]] = len(wasted) + good[:count]
  return index


@jax.jit
def _take(old, new, index):
  """Takes rows of the concatenation of two batches."""
  rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], old, new)
  return sharding.shard_rows(rows)


def _sum_times(a, b):
  """Sums the seconds of two rollouts, and gives tokens per second of both together."""
  tokens = [m.get('tokens_per_second/rollout', 0.0) * m['seconds/rollout'] for m in (a, b)]
  total = {name: a[name] + b[name] for name in a if name.startswith('seconds/')}
  if 'tokens_per_second/rollout' in a:
    total['tokens_per_second/rollout'] = sum(tokens) / total['seconds/rollout']
  return total
