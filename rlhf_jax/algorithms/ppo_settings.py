"""Every choice published PPO implementations make differently, and five of them as presets.

A preset only sets toggles. Where a figure is not in the implementation's defaults or paper,
the key is left to `config.ppo()`.
"""

import dataclasses

from rlhf_jax import experience
from rlhf_jax import update


@dataclasses.dataclass(frozen=True)
class Settings:
  """Static choices of a PPO train step.

  Attributes:
    epochs: passes over each rollout.
    minibatches: optimizer steps a pass; must divide the batch.
    microbatch_size: rows of one forward and backward pass; 0 for the whole minibatch.
    length_buckets: microbatches are of rows of like length, cut to one of so many; see lengths.cut. 1 for none.
    temperature: the one sampled with; logits of policy and reference are divided by it.
    end_tokens: token ids that end a response; () for none.
    kl_estimator: 'k1', 'k2', 'k3', 'abs' or 'full' (over the vocabulary).
    kl_in: 'reward' (Ziegler et al.) or 'loss' (GRPO).
    kl_controller: 'fixed', 'adaptive' or 'adaptive_per_token'; see advantages.next_kl_coef.
    kl_target: nats per sequence for 'adaptive', per token for 'adaptive_per_token'.
    kl_horizon: episodes, for 'adaptive'.
    gamma: discount per token.
    lam: GAE's trace decay.
    clip_low: policy clip below 1.
    clip_high: policy clip above 1.
    dual_clip: bound on the loss of negative advantages, in advantages; 0 for none.
    value_clip: clip around the old value; 0 for none.
    vf_coef: weight of the value loss.
    entropy_coef: weight of the entropy bonus.
    ptx_coef: weight of the language-modelling loss on pretraining rows (PPO-ptx).
    response: 'truncated' trains on what stands before the EOS; 'raw' on all R tokens, which
      are sampled past the EOS (lm-human-preferences). The reward sees the truncated text.
    score_position: 'last', 'after_end' or 'eos'; see advantages.score_index.
    missing_eos: 'none', 'replace' or 'subtract'; see advantages.apply_missing_eos.
    missing_eos_value: the constant of that rule.
    scale_scores: divide scores by their running standard deviation (trlX).
    clip_scores: bound on |score| after scaling; 0 for none.
    whiten_rewards: scale rewards to unit variance, keeping their mean.
    whiten_advantages: 'batch', 'minibatch' or 'none'.
    whiten_unbiased: divide variances by n - 1.
    behaviour: old log-probabilities from the training 'forward' pass or from the 'sampler'.
  """
  epochs: int
  minibatches: int
  microbatch_size: int
  length_buckets: int
  temperature: float
  end_tokens: tuple
  kl_estimator: str
  kl_in: str
  kl_controller: str
  kl_target: float
  kl_horizon: float
  gamma: float
  lam: float
  clip_low: float
  clip_high: float
  dual_clip: float
  value_clip: float
  vf_coef: float
  entropy_coef: float
  ptx_coef: float
  response: str
  score_position: str
  missing_eos: str
  missing_eos_value: float
  scale_scores: bool
  clip_scores: float
  whiten_rewards: bool
  whiten_advantages: str
  whiten_unbiased: bool
  behaviour: str

  @property
  def schedule(self):
    """update.Schedule."""
    return update.Schedule(self.epochs, self.minibatches, self.microbatch_size, self.length_buckets)

  @property
  def rules(self):
    """experience.ScoreRules."""
    return experience.ScoreRules(
        end_tokens=self.end_tokens, scale=self.scale_scores, clip=self.clip_scores,
        missing_eos=self.missing_eos, missing_eos_value=self.missing_eos_value)


# Config keys each preset sets, by their full names.
PRESETS = {
    # lm-human-preferences (https://arxiv.org/abs/1909.08593 and its train_policy.py).
    'openai2019': {
        'optim.name': 'tf_adam', 'optim.learning_rate': 1e-5, 'optim.schedule': 'linear',
        'optim.eps': 1e-5,
        'ppo.epochs': 4, 'ppo.minibatches': 1,
        'ppo.kl_coef': 0.15, 'ppo.kl_controller': 'adaptive', 'ppo.kl_target': 6.0,
        'sampling.temperature': 0.7,
        'ppo.response': 'raw', 'ppo.score_position': 'last',
        'ppo.missing_eos': 'replace', 'ppo.missing_eos_value': -1.0,
        'ppo.whiten_rewards': True, 'ppo.whiten_advantages': 'minibatch',
        'ppo.behaviour': 'sampler', 'critic.kind': 'trunk',
    },
    # The N implementation details, TL;DR (https://arxiv.org/abs/2403.17031).
    'n_plus': {
        'optim.learning_rate': 3e-6, 'optim.schedule': 'linear', 'optim.eps': 1e-5,
        'ppo.epochs': 4, 'ppo.minibatches': 1, 'ppo.kl_coef': 0.05,
        'sampling.temperature': 0.7,
        'ppo.score_position': 'after_end',
        'ppo.missing_eos': 'replace', 'ppo.missing_eos_value': -1.0,
        'critic.kind': 'separate',
    },
    # TRL 1.12, trl.experimental.ppo.
    'trl': {
        'optim.learning_rate': 3e-6, 'optim.schedule': 'linear',
        'ppo.epochs': 4, 'ppo.minibatches': 1, 'ppo.kl_coef': 0.05,
        'sampling.temperature': 0.7,
        'ppo.score_position': 'after_end',
        'ppo.missing_eos': 'subtract', 'ppo.missing_eos_value': 1.0,
        'ppo.whiten_unbiased': True, 'critic.kind': 'separate',
    },
    # trlX, default_ppo_config.
    'trlx': {
        'optim.learning_rate': 3e-5, 'optim.schedule': 'cosine', 'optim.b2': 0.95,
        'ppo.epochs': 4, 'ppo.kl_coef': 0.001,
        'sampling.temperature': 1.0, 'ppo.vf_coef': 1.0,
        'ppo.score_position': 'eos', 'ppo.missing_eos': 'none',
        'ppo.clip_scores': 10.0,
        'ppo.whiten_advantages': 'minibatch', 'ppo.whiten_unbiased': True,
        'critic.kind': 'trunk',
    },
    # Ouyang et al. 2022, appendix C (https://arxiv.org/abs/2203.02155).
    'instructgpt': {
        'optim.learning_rate': 9e-6, 'optim.b2': 0.95, 'batch_size': 512,
        'ppo.epochs': 1, 'ppo.minibatches': 8, 'ppo.kl_coef': 0.02,
        'sampling.temperature': 1.0,
        'ppo.score_position': 'eos', 'ppo.missing_eos': 'none',
        'ppo.ptx_coef': 27.8, 'critic.kind': 'separate',
    },
}
