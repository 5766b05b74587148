"""The steps that on-policy algorithms share after scoring: masks, rules on scores, metrics.

Letters: B batch, P prompt length, R response length, T = P + R.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from rlhf_jax import advantages as adv
from rlhf_jax import forward
from rlhf_jax import types
from rlhf_jax.rollout import sampling


@dataclasses.dataclass(frozen=True)
class ScoreRules:
  """Rules that are applied to scores before the policy is trained on them.

  Attributes:
    end_tokens: ids of the tokens that end a response; () for none.
    end_after: first position at which they end it.
    clip: bound of |score|; None for none.
    scale: whether to divide the clipped scores by their running standard deviation (trlX).
    missing_eos: 'none', 'replace' or 'subtract'; see advantages.apply_missing_eos.
    missing_eos_value: constant of that rule.
  """

  end_tokens: tuple[int, ...] = ()
  end_after: int = 0
  clip: float | None = None
  scale: bool = False
  missing_eos: str = 'none'
  missing_eos_value: float = 0.0

  def ended(self, rollout: types.Rollout) -> Bool[Array, ' B']:
    """Returns which responses [B] were not cut off; all of them if there are no end tokens."""
    if rollout.ended is not None:
      return rollout.ended
    length = rollout.response_mask.shape[1]
    if not self.end_tokens:
      return jnp.ones(rollout.tokens.shape[0], bool)
    ends = sampling.is_in(rollout.tokens[:, -length:], self.end_tokens)
    return jnp.any(
      ends & rollout.response_mask & (jnp.arange(length) >= self.end_after)[None], axis=1
    )

  def apply(
    self, scores: types.ScoreArray, rollout: types.Rollout, moments: Float[ArrayLike, '3']
  ) -> tuple[types.ScoreArray, Float[Array, '3']]:
    """Returns the scores that the policy is trained on.

    Args:
      scores: [B] float32, or [B, R] for rewards per token.
      rollout: Rollout.
      moments: [3] float32, see advantages.update_moments.

    Returns:
      Scores of the same shape, 0 for skipped responses (see `skip_nan`), and the new moments.
    """
    if self.clip:
      scores = jnp.clip(scores, -self.clip, self.clip)
    if self.scale:  # trlX's order: the moments are those of the clipped scores
      moments = adv.update_moments(moments, totals(scores, rollout.response_mask))
      scores = scores / adv.running_std(moments)
    scores = adv.apply_missing_eos(
      scores,
      self.ended(rollout),
      mode=self.missing_eos,
      value=self.missing_eos_value,
      response_mask=rollout.response_mask,
    )
    known = not_skipped(scores, rollout.response_mask)
    # A NaN would pass through masks in the backward pass.
    return jnp.where(known if scores.ndim == 1 else known[:, None], scores, 0.0), moments


def totals(scores: types.ScoreArray, response_mask: Bool[ArrayLike, 'B R']) -> Float[Array, ' B']:
  """Returns one score per response, [B]: sums of rewards per token; NaN for skipped responses."""
  if scores.ndim == 1:
    return scores
  skipped = jnp.isnan(scores) & ~jnp.any(response_mask, axis=1, keepdims=True)
  return jnp.sum(jnp.where(response_mask | skipped, scores, 0.0), axis=1)


def skip_nan(
  rollout: types.Rollout, scores: types.ScoreArray, *, rules: ScoreRules
) -> tuple[types.Rollout, Int[Array, '']]:
  """Removes the responses whose score is NaN from the update.

  Args:
    rollout: Rollout.
    scores: [B] float32, or [B, R] for rewards per token.
    rules: ScoreRules.

  Returns:
    Rollout with empty masks for the skipped responses, and their number.
  """
  mask = rollout.response_mask
  skipped = jnp.isnan(totals(scores, mask))
  rollout = rollout.replace(
    response_mask=mask & ~skipped[:, None], ended=rules.ended(rollout) | skipped
  )
  return rollout, jnp.sum(skipped)


def not_skipped(
  scores: types.ScoreArray, response_mask: Bool[ArrayLike, 'B R']
) -> Bool[Array, ' B']:
  """Returns which responses [B] `skip_nan` did not skip; any other NaN stops the run."""
  return jnp.any(response_mask, axis=1) | ~jnp.isnan(totals(scores, response_mask))


def make_experience(
  outputs: forward.Outputs,
  fixed: forward.Fixed,
  rollout: types.Rollout,
  step_mask: Bool[ArrayLike, 'B R'],
  *,
  behaviour: str,
) -> types.Experience:
  """Makes an Experience without advantages.

  Args:
    outputs: forward.Outputs before the update.
    fixed: forward.Fixed.
    rollout: Rollout.
    step_mask: [B, R] bool, positions with a value loss.
    behaviour: 'sampler' to take the old log-probabilities from the rollout, else from `outputs`.
  """
  mask = rollout.response_mask
  keep = lambda x, mask: None if x is None else jnp.where(mask, x, 0.0)
  logprobs = rollout.logprobs if behaviour == 'sampler' else outputs.logprobs
  return types.Experience(
    tokens=rollout.tokens,
    mask=rollout.mask,
    response_mask=mask,
    step_mask=step_mask,
    logprobs=keep(logprobs, mask),
    ref_logprobs=keep(fixed.ref_logprobs, mask),
    values=keep(outputs.values, step_mask),
    frozen_states=fixed.frozen_states,
    allowed=rollout.allowed,
    raw_logprobs=keep(outputs.raw_logprobs, mask),
  )


def rollout_metrics(
  experience: types.Experience,
  rollout: types.Rollout,
  scores: types.ScoreArray,
  postprocessed: types.ScoreArray,
  outputs: forward.Outputs,
  kl_coef: float | Float[ArrayLike, ''],
  rules: ScoreRules,
) -> dict[str, Num[Array, '...']]:
  """Computes metrics of a scored rollout: means over responses of sums over their tokens.

  `objective/scores` is what the reward gave, `objective/postprocessed_scores` what the policy is
  trained on. TRL reports the second as objective/scores if an EOS is missing.
  `objective/entropy_per_response` is the entropy of the distribution, where TRL has -log p of the
  sampled tokens. `objective/rlhf_reward` subtracts the k1 estimate of the KL, whatever the policy
  is penalized with. See docs/presets.md.

  Args:
    experience: Experience, with `returns` if there is a critic.
    rollout: Rollout.
    scores: [B] or [B, R] float32, before the rules.
    postprocessed: [B] or [B, R] float32, after them.
    outputs: forward.Outputs before the update.
    kl_coef: float32 scalar.
    rules: ScoreRules.

  Returns:
    {name: scalar}, and of each response {'samples/postprocessed_score': [B]} for samples.jsonl.
  """
  mask, steps = rollout.response_mask, experience.step_mask
  known = not_skipped(scores, mask)
  batch = jnp.maximum(jnp.sum(known), 1)
  scores, postprocessed = totals(scores, mask), totals(postprocessed, mask)
  # The mean of equal numbers may be rounded, so their deviation from it need not be 0.
  equal = jnp.max(jnp.where(known, scores, -jnp.inf)) == jnp.min(jnp.where(known, scores, jnp.inf))
  metrics = {
    'objective/entropy_per_response': adv.masked_sum(outputs.entropy, mask) / batch,
    'objective/scores': adv.masked_mean(scores, known),
    'objective/scores_std': jnp.where(equal, 0.0, jnp.sqrt(adv.masked_var(scores, known))),
    'objective/postprocessed_scores': adv.masked_mean(postprocessed, known),
    'samples/postprocessed_score': postprocessed,
    'response/length': jnp.sum(mask) / batch,
    'response/eos_rate': adv.masked_mean(rules.ended(rollout), known),
    'policy/sampler_gap': adv.masked_mean(jnp.abs(rollout.logprobs - outputs.logprobs), mask),
  }
  if experience.ref_logprobs is not None:
    log_ratio = experience.unmasked_logprobs - experience.ref_logprobs
    kl = adv.masked_sum(log_ratio, mask) / batch
    spread = jnp.sqrt(adv.masked_var(jnp.sum(jnp.where(mask, log_ratio, 0.0), axis=1), known))
    metrics |= {
      'objective/kl': kl,
      'objective/kl_se': spread / jnp.sqrt(jnp.maximum(batch - 1, 1)),
      'objective/kl_per_token': adv.masked_mean(log_ratio, mask),
      'objective/kl_coef': kl_coef,
      'objective/rlhf_reward': adv.masked_mean(postprocessed, known) - kl_coef * kl,
    }
  if experience.returns is not None:
    variance = adv.masked_var(experience.returns, steps)
    error = adv.masked_var(experience.returns - experience.values, steps)
    metrics |= {
      'returns/mean': adv.masked_mean(experience.returns, steps),
      'returns/var': variance,
      'value/explained_variance': 1.0 - error / jnp.maximum(variance, 1e-8),
    }
  return metrics
