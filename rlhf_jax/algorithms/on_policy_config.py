"""Config keys, checks and settings that on-policy algorithms share.

Letters: B batch, n responses per prompt, R response length.
"""

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from rlhf_jax import advantages
from rlhf_jax import config as config_lib
from rlhf_jax import experience
from rlhf_jax import losses
from rlhf_jax import update
from rlhf_jax.algorithms import on_policy_warnings
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.rewards import scorers
from rlhf_jax.rollout import stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Static settings of an on-policy train step. Fields with a default are the keys of `config.rl`.

  Attributes:
    microbatch_size: sequences of one forward and backward pass; 0 for the whole minibatch.
    temperature: sampling temperature; logits of policy and reference are divided by it.
    samples: n, responses per prompt.
    max_new_tokens: R.
    end_tokens: token ids that end a response; () for none.
    end_after: first position at which `end_tokens` end a response.
    epochs: passes over each rollout.
    minibatches: optimizer steps per pass; must divide batch_size.
    length_buckets: number of lengths that microbatches are cut to, each compiled once; 1 cuts none.
      See update.Schedule.
    kl_coef: coefficient of the KL penalty; its first value if rl.kl_controller adapts it.
    kl_estimator: 'k1', 'k2', 'k3', 'abs' or 'full' (over the vocabulary); see
      advantages.kl_estimate.
    kl_in: where the KL penalty is: in the 'reward' (Ziegler et al.) or in the 'loss' (GRPO).
    clip_low: lower clip range: the ratio is clipped at 1 - clip_low.
    clip_high: upper clip range: the ratio is clipped at 1 + clip_high.
    dual_clip: the loss of a negative advantage A is at most -dual_clip * A; None: no bound.
    entropy_coef: weight of the entropy bonus.
    ptx_coef: weight of the language-modelling loss on pretraining examples (PPO-ptx).
    response: 'truncated' ends a response at its EOS; 'raw' samples past the EOS and trains on all
      max_new_tokens tokens (lm-human-preferences). The reward always reads the truncated text.
    missing_eos: rule for responses without an EOS: 'replace' their score by missing_eos_value,
      'subtract' it from their score, or 'none'.
    missing_eos_value: the value of that rule.
    clip_scores: scores are clipped to [-clip_scores, clip_scores]; None: no clipping.
    scale_scores: divide the clipped scores by their running standard deviation (trlX).
    behaviour: where the old log-probabilities come from: 'forward', a pass before the update;
      'minibatch', the same pass in the shapes of the first epoch's minibatches, which keeps the
      first ratio at 1 in bfloat16 too; or the 'sampler'.
    importance_cap: the policy loss of each token is multiplied by its importance weight, at most
      this number: how likely the token is now, over how likely it was for the sampler; None: no
      weights. See docs/staleness.md.
  """

  microbatch_size: int
  temperature: float
  samples: int
  max_new_tokens: int
  end_tokens: tuple[int, ...]
  end_after: int
  epochs: int = 4
  minibatches: int = 1
  length_buckets: int = 4
  kl_coef: float = 0.05
  kl_estimator: str = 'k1'
  kl_in: str = 'reward'
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float | None = None
  entropy_coef: float = 0.0
  ptx_coef: float = 0.0
  response: str = 'truncated'
  missing_eos: str = 'none'
  missing_eos_value: float = -1.0
  clip_scores: float | None = None
  scale_scores: bool = False
  behaviour: str = 'forward'
  importance_cap: float | None = None

  @property
  def schedule(self):
    """Returns the update.Schedule of these settings."""
    return update.Schedule(
      self.epochs,
      self.minibatches,
      self.microbatch_size,
      self.length_buckets,
      before_like_first=self.behaviour == 'minibatch',
    )

  @property
  def clips(self):
    """Returns the clip arguments of losses.clipped_policy_loss."""
    return {'clip_low': self.clip_low, 'clip_high': self.clip_high, 'dual_clip': self.dual_clip}

  @property
  def rules(self):
    """Returns the experience.ScoreRules of these settings."""
    return experience.ScoreRules(
      end_tokens=self.end_tokens,
      end_after=self.end_after,
      scale=self.scale_scores,
      clip=self.clip_scores,
      missing_eos=self.missing_eos,
      missing_eos_value=self.missing_eos_value,
    )

  @property
  def resampling(self):
    """Returns the resampling.Resampling of dynamic sampling; None for none."""
    return None

  @classmethod
  def of(cls, config, end_tokens, end_after=0):
    """Returns the settings of a config; see `end_tokens` for the other arguments."""
    return cls(
      microbatch_size=config.microbatch_size or 0,
      temperature=config.sampling.temperature,
      samples=config.sampling.samples,
      max_new_tokens=config.sampling.max_new_tokens,
      end_tokens=end_tokens,
      end_after=end_after,
      **config.rl,
    )


def config(algorithm, settings):
  """Returns the default config of an on-policy algorithm.

  Args:
    algorithm: Name of the algorithm.
    settings: Class of its settings, `Settings` or a subclass.

  Returns:
    ConfigDict.
  """
  defaults = config_lib.common(algorithm)
  defaults.batch_size = 64
  defaults.optim.learning_rate = 1e-5
  defaults.data = ml_collections.ConfigDict(prompts())
  defaults.reference = placeholder(str)  # folder of the reference; None: the initial policy
  defaults.reward = scorers.config()
  defaults.sampling = ml_collections.ConfigDict(
    sampling()
    | {
      'truncate_at': placeholder(str),  # if rl.response='raw': token that ends the text; None: EOS
      'truncate_after': 0,  # first position at which truncate_at ends the text
      'samples': 1,  # responses per prompt; must divide batch_size
      'staleness': 0,  # 1: sample the next rollout while this one is scored; see docs/staleness.md
    }
  )
  ptx = config_lib.data() | {
    'batch_size': placeholder(int),  # pretraining examples per iteration, split over minibatches
  }
  del ptx['chat_template']  # the tokenizer has one, from data.chat_template
  defaults.ptx = ml_collections.ConfigDict(ptx)
  defaults.warn = on_policy_warnings.config()
  defaults.rl = ml_collections.ConfigDict(
    {
      f.name: placeholder(float) if f.default is None else f.default
      for f in dataclasses.fields(settings)
      if f.default is not dataclasses.MISSING
    }
  )
  return defaults


def prompts():
  """Returns a dict of the keys of a data set of prompts."""
  data = config_lib.data() | {
    'kind': 'prompt',
    'epochs': placeholder(float),  # passes over the prompts; or set steps
    'max_prompt_length': 64,  # maximum number of tokens of a prompt
    'on_long': 'error',  # longer prompts: 'error', 'drop', or 'truncate_left' for policy and reward
  }
  del data['max_length']
  return data


def sampling():
  """Returns a dict of the keys by which responses are sampled."""
  return {
    'max_new_tokens': 32,  # maximum number of tokens of a response
    'temperature': 1.0,  # divides the logits, in training too
    'top_k': placeholder(int),  # sample among the k most likely tokens; None: all
    'top_p': 1.0,  # sample among the most likely tokens with this total probability
    'min_new_tokens': 0,  # number of tokens before one that may end a response
    'stop': (),  # strings that end a response
    'max_concurrent': placeholder(int),  # responses decoded at once; None: all
    'gather_weights': False,  # gather 'fsdp' shards once per rollout; max_concurrent always does
  }


def critic():
  """Returns `config.critic` of an algorithm with a critic."""
  return ml_collections.ConfigDict(
    {
      'kind': 'separate',  # 'separate' model, 'trunk' (head on the policy's states) or 'adapters'
      'path': placeholder(str),  # folder of a separate critic; None: the first reward model
      'learning_rate': placeholder(float),  # learning rate of the critic; None: the policy's
    }
  )


def validate(config, device_count):
  """Validates the keys that on-policy algorithms share.

  Args:
    config: ConfigDict with the keys of `config`.
    device_count: Number of devices over all processes.

  Raises:
    UserError: A value is invalid. The message names the key, the value and the remedy.
  """
  need, one_of, divides = config_lib.need, config_lib.one_of, config_lib.divides
  rl, ptx = config.rl, config.ptx
  one_of(config, 'data.kind', ('prompt',))
  one_of(config, 'data.on_long', ('error', 'truncate_left', 'drop'))
  one_of(config, 'rl.kl_estimator', advantages.KL_ESTIMATORS)
  one_of(config, 'rl.kl_in', ('reward', 'loss'))
  one_of(config, 'rl.response', ('truncated', 'raw'))
  one_of(config, 'rl.missing_eos', advantages.MISSING_EOS)
  one_of(config, 'rl.behaviour', ('forward', 'minibatch', 'sampler'))
  need(0 <= rl.clip_low <= 1, f'config.rl.clip_low={rl.clip_low} must be in [0, 1]')
  for key in ('kl_coef', 'clip_high', 'entropy_coef', 'ptx_coef'):
    need(rl[key] >= 0, f'config.rl.{key}={rl[key]} must be 0 or positive')
  need(
    rl.dual_clip is None or rl.dual_clip > 1,
    f'config.rl.dual_clip={rl.dual_clip} must be above 1, or None',
  )
  config_lib.optional_positive(rl, 'rl.', ('clip_scores', 'importance_cap'))
  for key in ('epochs', 'minibatches', 'length_buckets'):
    need(rl[key] > 0, f'config.rl.{key}={rl[key]} must be positive')
  divides(rl.minibatches, config.batch_size, 'rl.minibatches', 'batch_size')
  divides(
    config.microbatch_size,
    config.batch_size // rl.minibatches,
    'microbatch_size',
    'batch_size / config.rl.minibatches',
  )
  scorers.validate(config.reward)
  config_lib.refuse_evals(
    config.evals, ('loss',), 'an algorithm with a held-out loss: use another kind'
  )
  validate_sampling(config, device_count)
  on_policy_warnings.validate(config)
  need(
    not (rl.kl_estimator == 'full' and rl.kl_in == 'loss'),
    "config.rl.kl_estimator='full' works with config.rl.kl_in='reward' only",
  )
  need(
    config.model.unfrozen_layers is None or not config.reference,
    f'config.reference={config.reference!r}: with config.model.unfrozen_layers='
    f'{config.model.unfrozen_layers} the reference shares the frozen layers with the policy; '
    'set config.reference to None, or config.model.unfrozen_layers to None',
  )
  need(
    (rl.ptx_coef > 0) == bool(ptx.batch_size),
    f'config.rl.ptx_coef={rl.ptx_coef} and config.ptx.batch_size='
    f'{ptx.batch_size}: set both to add a pretraining loss, or neither',
  )
  if ptx.batch_size:
    config_lib.validate_data(ptx, 'ptx')
    one_of(config, 'ptx.kind', sft.KINDS)
    divides(rl.minibatches, ptx.batch_size, 'rl.minibatches', 'ptx.batch_size')
    config_lib.divides_over_shards(config, device_count, 'ptx.batch_size', ptx.batch_size)
  need(
    not (rl.missing_eos == 'subtract' and rl.missing_eos_value < 0),
    "config.rl.missing_eos='subtract' subtracts config.rl.missing_eos_value="
    f'{rl.missing_eos_value} from the score, which would reward responses without an EOS: set a '
    'positive value',
  )


def validate_sampling(config, device_count):
  """Validates `config.sampling`; see `validate`."""
  need, rl, sampling = config_lib.need, config.rl, config.sampling
  need(
    sampling.truncate_after >= 0,
    f'config.sampling.truncate_after={sampling.truncate_after} must be 0 or positive',
  )
  need(
    sampling.truncate_at is None or rl.response == 'raw',
    f"config.sampling.truncate_at={sampling.truncate_at!r} needs config.rl.response='raw', which "
    'samples past that token',
  )
  need(
    not (sampling.stop and rl.response == 'raw'),
    f"config.sampling.stop={sampling.stop} needs config.rl.response='truncated'",
  )
  need(
    sampling.staleness in (0, 1),
    f'config.sampling.staleness={sampling.staleness} must be 0, or 1 to train on responses of '
    'the policy before the last update',
  )
  need(sampling.samples > 0, f'config.sampling.samples={sampling.samples} must be positive')
  config_lib.divides(sampling.samples, config.batch_size, 'sampling.samples', 'batch_size')
  config_lib.divides_over_shards(
    config,
    device_count,
    'batch_size / config.sampling.samples',
    config.batch_size // sampling.samples,
  )
  validate_sampler(config, device_count, 'batch_size', config.batch_size)


def validate_sampler(config, device_count, name, responses):
  """Validates the keys of `sampling`.

  Args:
    config: Config of the run.
    device_count: Number of devices over all processes.
    name: Config key of the number of responses in a batch, for messages.
    responses: That number.

  Raises:
    UserError: A value is invalid; see `validate`.
  """
  need, sampling = config_lib.need, config.sampling
  need(
    sampling.temperature > 0,
    f'config.sampling.temperature={sampling.temperature} must be positive: with greedy '
    'decoding there is no exploration',
  )
  need(
    sampling.max_new_tokens > 0,
    f'config.sampling.max_new_tokens={sampling.max_new_tokens} must be positive',
  )
  config_lib.optional_positive(sampling, 'sampling.', ('top_k', 'max_concurrent'))
  need(0 < sampling.top_p <= 1, f'config.sampling.top_p={sampling.top_p} must be in (0, 1]')
  need(
    0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
    f'config.sampling.min_new_tokens={sampling.min_new_tokens} must be from 0 to '
    f'config.sampling.max_new_tokens={sampling.max_new_tokens}',
  )
  if sampling.max_concurrent:
    need(
      sampling.max_concurrent < responses,
      f'config.sampling.max_concurrent={sampling.max_concurrent} must be less than '
      f'config.{name}={responses}, or None to sample all at once',
    )
    config_lib.divides_over_shards(
      config, device_count, 'sampling.max_concurrent', sampling.max_concurrent
    )


def validate_critic(config):
  """Validates `config.critic`.

  Raises:
    UserError: A value is invalid; see `validate`.
  """
  need, critic = config_lib.need, config.critic
  config_lib.one_of(config, 'critic.kind', ('separate', 'trunk', 'adapters'))
  need(
    critic.kind == 'separate' or not critic.path,
    f"config.critic.kind={critic.kind!r} uses the policy's weights: it cannot start from "
    f"config.critic.path={critic.path!r}; use kind 'separate' or set the path to None",
  )
  need(
    critic.kind != 'adapters' or len(config.model.lora.targets) > 0 or config.model.lora.path,
    "config.critic.kind='adapters' needs config.model.lora.targets: the critic adapts the same "
    'weights as the policy',
  )


def validate_without_critic(config, *, groups):
  """Validates the keys of algorithms without a critic.

  Args:
    config: Config of the run.
    groups: Whether the baseline of a response needs other responses to the same prompt.

  Raises:
    UserError: A value is invalid; see `validate`.
  """
  need, samples = config_lib.need, config.sampling.samples
  need(
    config.rl.kl_coef or not config.reference, 'config.reference needs config.rl.kl_coef above 0'
  )
  need(
    samples > 1 or not groups,
    f'config.sampling.samples={samples} must be at least 2: the baseline of a response '
    'is the other responses to the same prompt',
  )
  if 'normalize' in config.rl:
    config_lib.one_of(config, 'rl.normalize', losses.NORMALIZERS)


def make_sampling(config, tokenizer):
  """Returns the sampling.Sampling of a config, with the tokenizer's EOS and padding tokens."""
  c = config.sampling
  return stops.sampling_of(
    tokenizer,
    stop=c.stop,
    max_new_tokens=c.max_new_tokens,
    min_new_tokens=c.min_new_tokens,
    temperature=c.temperature,
    top_k=c.top_k or 0,
    top_p=c.top_p,
    ignore_eos=config.rl.response == 'raw',
  )


def end_tokens(config, tokenizer):
  """Returns the token ids that end a response and the first position at which they do.

  Raises:
    UserError: `config.sampling.truncate_at` is not a single token.
  """
  text = config.sampling.truncate_at
  if text is None:
    return make_sampling(config, tokenizer).end_tokens, 0
  token = stops.single_token(tokenizer, text, name='config.sampling.truncate_at')
  return (token,), config.sampling.truncate_after


def check_length(config, model):
  """Raises UserError if a prompt and its response exceed the model's context."""
  prompt, response = config.data.max_prompt_length, config.sampling.max_new_tokens
  if model.encoder_decoder:
    setup.check_length(prompt, model, 'data.max_prompt_length')
    setup.check_length(response, model, 'sampling.max_new_tokens')
  else:
    setup.check_length(
      prompt + response, model, 'data.max_prompt_length + config.sampling.max_new_tokens'
    )
