"""Advantage actor-critic: the plain policy gradient with a critic, one pass over each rollout.

See Mnih et al. 2016, §4 and eq. S3 (https://arxiv.org/abs/1602.01783). The defaults are those of
Stable-Baselines3 and RL4LMs (https://arxiv.org/abs/2210.01241), `algorithms/a2c/a2c.py`. Rewards,
advantages and returns are PPO's.

Differences from RL4LMs: means are over the tokens of whole responses, where its buffer of n_steps
tokens cuts the last response; gradients of policy and critic are clipped separately.

Letters: B batch, R response length.
"""

import dataclasses
import functools

import jax.numpy as jnp

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax.algorithms import on_policy
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import ppo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ppo.Settings):
  """Static settings of an A2C train step. The fields only change defaults of PPO's.

  Attributes:
    epochs: passes over each rollout: 1.
    vf_coef: weight of the value loss, which is the squared error without PPO's factor of 1/2.
  """

  epochs: int = 1
  gamma: float = 0.99
  lam: float = 1.0
  value_clip: float | None = None
  vf_coef: float = 0.5
  whiten_advantages: str = 'none'


PRESETS = {
  # RL4LMs, scripts/training/task_configs/imdb_text_continuation/gpt2_a2c.yml.
  'rl4lms': {
    'optim.learning_rate': 1e-6,
    'rl.kl_coef': 0.1,
    'rl.kl_controller': 'adaptive_per_token',
    'rl.kl_target': 0.5,
    'batch_size': 2,
  },
}


def config(preset=''):
  """Returns the default config of A2C, changed by a preset; see ppo.config."""
  defaults = on_policy_config.config('a2c', Settings)
  defaults.critic = on_policy_config.critic()
  defaults.optim.update({'name': 'rmsprop', 'b2': 0.99, 'eps': 1e-5, 'clip_norm': 0.5})
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of A2C; see ppo.validate."""
  ppo.validate(config, device_count)
  config_lib.need(
    config.rl.epochs == 1,
    f'config.rl.epochs={config.rl.epochs} must be 1: the loss of A2C has no importance ratio, so a '
    "rollout is used once; config.algorithm='ppo' makes several passes",
  )


def loss(outputs, experience, counts, *, kl_coef, settings):
  """Computes a microbatch's part of the minibatch's mean losses; see ppo.loss.

  -A log p  and  (V - G)^2
  """
  mask = experience.response_mask
  logprobs = jnp.where(mask, outputs.logprobs, 0.0)
  total, metrics = ppo.actor_critic_loss(
    -experience.advantages * logprobs,
    jnp.square(outputs.values - experience.returns),
    outputs,
    experience,
    counts,
    kl_coef=kl_coef,
    settings=settings,
  )
  ratio = jnp.exp(logprobs - experience.logprobs)
  return total, metrics | {'policy/ratio': adv.masked_sum(ratio, mask) / counts.tokens}


def objective(state, rollout, scores, *, settings):
  """Returns A2C's update.Objective for a scored rollout: PPO's with another loss."""
  return ppo.objective(state, rollout, scores, settings=settings)._replace(
    loss=functools.partial(loss, kl_coef=state.extra['kl_coef'], settings=settings)
  )


train_step = functools.partial(on_policy.train_step, objective)


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'a2c'`; see on_policy.create."""
  return on_policy.create(config, mesh, Settings, train_step)
