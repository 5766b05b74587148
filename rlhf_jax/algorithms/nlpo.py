"""Natural language policy optimization: PPO that samples only among likely tokens.

See Ramamurthy et al. 2022, §4 (https://arxiv.org/abs/2210.01241). A masking policy, a copy of the
policy that is refreshed every `mask_every` iterations, allows the smallest set of tokens with
probability `mask_top_p` at each position. The sampler draws among them. The update computes log-
probabilities over the same sets, which are stored with the rollout, one bit per token. The KL
penalty compares log-probabilities over all tokens. All else is PPO.

Differences from RL4LMs (https://github.com/allenai/RL4LMs, commit 97df0bd):
- Its sampler keeps the masking model that it was created with, so its copies have no effect: the
  masking policy there is always the initial policy. Ours is refreshed, as in algorithm 1 of the
  paper, after the update. `mask_every` above `steps` gives RL4LMs' behaviour.
- Its update has the log-probabilities over all tokens: its MaskableCategorical does not divide by
  the probability of the allowed ones. `mask_update` = False does the same.
- Evaluators and the exported model sample without masks.
- Its `MaskLogitsProcessorSeq2SeqLM` keeps one token more than `mask_min_tokens`.

Letters: B batch, R response length, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import ppo
from rlhf_jax.rollout import masking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ppo.Settings):
  """Static settings of an NLPO train step, in addition to those of PPO.

  Attributes:
    mask_top_p: probability of the smallest set of tokens that the masking policy allows; 1 allows
      all tokens.
    mask_min_tokens: number of the most likely tokens that are always allowed.
    mask_every: iterations after which the policy is copied to the masking policy.
    mask_update: whether the update computes log-probabilities over the allowed tokens, as the paper
      has it, instead of over all (RL4LMs).
  """

  mask_top_p: float = 0.9
  mask_min_tokens: int = 100
  mask_every: int = 20
  mask_update: bool = True


# The settings in the files of RL4LMs; see the differences above.
_RL4LMS = {
  'optim.weight_decay': 1e-6,
  'optim.clip_norm': 0.5,
  'rl.epochs': 5,
  'rl.gamma': 0.99,
  'rl.vf_coef': 1.0,  # times half the squared error; RL4LMs: 0.5 times the squared error
  'rl.value_clip': None,
  'rl.whiten_advantages': 'minibatch',
  'rl.whiten_unbiased': True,
  'rl.kl_controller': 'adaptive_per_token',
  'rl.mask_update': False,
}
# scripts/training/task_configs of RL4LMs. An iteration there is 1,280 tokens in minibatches of 64.
PRESETS = {
  # imdb_text_continuation/gpt2_nlpo.yml; generation_kwargs leaves top_k at the default of GPT-2.
  'rl4lms_imdb': _RL4LMS
  | {
    'optim.learning_rate': 1e-6,
    'rl.kl_coef': 0.1,
    'rl.kl_target': 0.1,
    'rl.mask_every': 5,
    'data.max_prompt_length': 64,
    'sampling.max_new_tokens': 48,
    'sampling.min_new_tokens': 48,
    'sampling.top_k': 50,
    'batch_size': 32,
    'rl.minibatches': 16,
  },
  # synthetic_generate_increasing_numbers/gpt2_nlpo.yml.
  'rl4lms_numbers': _RL4LMS
  | {
    'optim.learning_rate': 1e-5,
    'rl.lam': 0.9,
    'rl.vf_coef': 0.2,  # RL4LMs: 0.1 times the squared error
    'rl.kl_coef': 0.02,
    'rl.kl_target': 2.0,
    'rl.mask_every': 100,
    'data.max_prompt_length': 5,
    'sampling.max_new_tokens': 20,
    'sampling.min_new_tokens': 20,
    'batch_size': 64,
    'rl.minibatches': 16,
  },
}


def config(preset=''):
  """Returns the default config of NLPO, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('nlpo', Settings)
  defaults.critic = on_policy_config.critic()
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of NLPO; see ppo.validate."""
  ppo.validate(config, device_count)
  need, rl = config_lib.need, config.rl
  need(0 < rl.mask_top_p <= 1, f'config.rl.mask_top_p={rl.mask_top_p} must be in (0, 1]')
  need(rl.mask_every > 0, f'config.rl.mask_every={rl.mask_every} must be positive')
  least = 2 + len(config.sampling.stop) if config.sampling.min_new_tokens else 1
  need(
    rl.mask_min_tokens >= least,
    f'config.rl.mask_min_tokens={rl.mask_min_tokens} must be at least {least}: otherwise '
    'config.sampling.min_new_tokens may forbid all allowed tokens',
  )
  need(
    rl.kl_in == 'reward' or not rl.kl_coef,
    f"config.rl.kl_in={rl.kl_in!r} must be 'reward': the log-probabilities of the loss are those "
    'of the allowed tokens only',
  )
  need(
    rl.behaviour != 'sampler' or rl.mask_update or rl.mask_top_p == 1,
    "config.rl.behaviour='sampler' needs config.rl.mask_update=True: the sampler's log-"
    'probabilities are those of the allowed tokens only, but the loss and the KL penalty would '
    'compare them with log-probabilities over all tokens',
  )


def masked_share(rollout, vocab):
  """Returns the fraction of the vocabulary that is masked, averaged over response tokens.

  Args:
    rollout: Rollout; without `allowed` nothing is masked.
    vocab: V.
  """
  if rollout.allowed is None:
    return jnp.zeros(())
  count = jnp.sum(jax.lax.population_count(rollout.allowed), axis=-1, dtype=jnp.int32)
  return 1.0 - adv.masked_mean(count / vocab, rollout.response_mask)


def train_step(state, frozen, rollout, scores, ptx, *, models, optimizers, settings):
  """Updates the models as PPO does, then the masking policy; see on_policy.train_step."""
  new, metrics = on_policy.train_step(
    ppo.objective,
    state,
    frozen,
    rollout if settings.mask_update else rollout.replace(allowed=None),
    scores,
    ptx,
    models=models,
    optimizers=optimizers,
    settings=settings,
  )
  metrics['policy/masked_share'] = masked_share(rollout, models.policy.vocab_size)
  if settings.mask_top_p == 1:
    return new, metrics
  due = new.step % settings.mask_every == 0
  masking_policy = jax.tree.map(
    lambda new, old: jnp.where(due, new, old), new.params['policy'], state.extra['masking_policy']
  )
  return new.replace(extra=new.extra | {'masking_policy': masking_policy}), metrics


def masked_model(model, settings, tokenizer):
  """Returns the masking.MaskedModel to sample with; special tokens are always allowed."""
  always = tuple(sorted(set(tokenizer.all_special_ids)))
  return masking.MaskedModel(model, settings.mask_top_p, settings.mask_min_tokens, always)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'nlpo'`; see on_policy.create.

  If all tokens are allowed, there is no masking policy, and the run is PPO's.
  """
  mask = masked_model if config.rl.mask_top_p < 1 else None
  return on_policy.create(config, mesh, Settings, train_step, mask=mask)
