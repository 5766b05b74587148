"""Distillation: a student learns the next-token distributions of a frozen teacher.

    L = mean over response tokens of D(pi(. | x, y_<t), pi_teacher(. | c, x, y_<t))

D is the reverse KL, the forward KL or the generalized Jensen-Shannon divergence over the whole
vocabulary; see losses.divergence. The responses y are the student's own samples (on-policy
distillation, GKD: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649), completions of the data
(offline distillation), or some of each. No gradient flows through the sampling.

The context c is a text that only the teacher reads, before each prompt x. If the teacher is the
initial student, this is context distillation (Askell et al. 2021, §2.2,
https://arxiv.org/abs/2112.00861): the student learns to answer as if the context were there.

Differences: GKD decides by chance for each batch whether the student samples it; here every batch
has the same fraction of samples, `student_fraction`, GKD's lambda. Askell et al. keep the teacher's
50 most likely tokens and their probabilities on disk; here the teacher runs in every train step, so
that nothing is truncated and nothing can be out of date. As in TRL, the sampling temperature
divides the logits of both models, and the loss is the mean over all tokens of the batch.

Letters: B batch, P prompt length, R response length, T = P + R, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder
import numpy as np

from rlhf_jax import advantages as adv
from rlhf_jax import config as config_lib
from rlhf_jax import errors
from rlhf_jax import learner
from rlhf_jax import logprobs
from rlhf_jax import losses
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.algorithms import distillation_data
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import setup
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import evaluators
from rlhf_jax.models import base
from rlhf_jax.models import hf
from rlhf_jax.models import trainable
from rlhf_jax.rollout import actor as actor_lib
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import sampling as sampling_lib

PRESETS = {
  # Agarwal et al. 2023 and TRL 1.12, trl.experimental.gkd.GKDConfig.
  'gkd': {
    'distillation.loss': 'jsd',
    'distillation.beta': 0.5,
    'distillation.student_fraction': 0.5,
    'sampling.temperature': 0.9,
  },
  # Distillation of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531) on the data alone.
  'offline': {'distillation.loss': 'forward_kl', 'distillation.student_fraction': 0.0},
}


def config(preset=''):
  """Returns the default config of distillation, changed by a preset; see ppo.config."""
  defaults = config_lib.common('distillation')
  defaults.batch_size = 64
  defaults.optim.learning_rate = 1e-5
  data = on_policy_config.prompts() | {
    'max_length': 128,  # maximum number of tokens of a prompt with its completion
  }
  del data['kind']
  defaults.data = ml_collections.ConfigDict(data)
  defaults.sampling = ml_collections.ConfigDict(on_policy_config.sampling())
  defaults.distillation = ml_collections.ConfigDict(
    {
      'teacher': placeholder(str),  # folder of the teacher; None: the initial student
      'context': placeholder(str),  # text or its file, which only the teacher reads, before prompts
      'loss': 'reverse_kl',  # 'reverse_kl', 'forward_kl' or 'jsd' (generalized Jensen-Shannon)
      'beta': 0.5,  # weight of the teacher in the mixture of 'jsd'
      'student_fraction': 1.0,  # fraction of a batch that the student samples; the rest is data
    }
  )
  return config_lib.apply_preset(defaults, PRESETS, preset)


def validate(config, device_count):
  """Validates a config of distillation; see ppo.validate."""
  need, block = config_lib.need, config.distillation
  config_lib.one_of(config, 'distillation.loss', losses.DIVERGENCES)
  config_lib.one_of(config, 'data.on_long', ('error', 'truncate_left', 'drop'))
  config_lib.divides(config.microbatch_size, config.batch_size, 'microbatch_size', 'batch_size')
  need(0 < block.beta < 1, f'config.distillation.beta={block.beta} must be in (0, 1)')
  need(
    block.teacher or block.context,
    'config.distillation.teacher and config.distillation.context are both empty: name the folder '
    'of a teacher, or set a context that the initial student reads as the teacher',
  )
  fraction, samples = block.student_fraction, distillation_data.sample_count(config)
  need(
    0 <= fraction <= 1 and abs(samples - fraction * config.batch_size) < 1e-6,
    f'config.distillation.student_fraction={fraction} must be from 0 to 1 and give a whole number '
    f'of the config.batch_size={config.batch_size} responses',
  )
  name = 'distillation.student_fraction * config.batch_size'
  config_lib.divides_over_shards(config, device_count, name, samples)
  if samples:
    on_policy_config.validate_sampler(config, device_count, name, samples)
  need(
    config.sampling.temperature > 0,
    f'config.sampling.temperature={config.sampling.temperature} must be positive: it divides the '
    'logits of both models',
  )
  need(
    not (block.context and config.data.on_long == 'drop'),
    "config.data.on_long='drop' would drop different prompts for the teacher, which reads "
    "config.distillation.context: use 'error' or 'truncate_left'",
  )
  config_lib.refuse_evals(
    config.evals, ('loss',), 'an algorithm with a held-out loss: use another kind'
  )


@dataclasses.dataclass(frozen=True)
class Models:
  """The models without parameters, and the settings of the loss; static under jit.

  Attributes:
    student: Model.
    teacher: Model.
    loss: one of losses.DIVERGENCES.
    beta: see losses.divergence.
    sampling: sampling.Sampling; its temperature divides the logits of both models.
  """

  student: base.LanguageModel
  teacher: base.LanguageModel
  loss: str
  beta: float
  sampling: sampling_lib.Sampling

  def check_length(self, pairs):
    """Raises UserError if Pairs are too long for the teacher."""
    response = pairs.response_mask.shape[1]
    prompt = pairs.tokens.shape[1] - response
    length = max(prompt, response) if self.teacher.encoder_decoder else prompt + response
    if length > self.teacher.max_length:
      raise errors.UserError(
        f'the teacher reads up to {prompt} tokens of config.distillation.context and a prompt, and '
        f'{response} of a response, more than its context of {self.teacher.max_length} tokens: '
        'shorten the context, or lower config.data.max_prompt_length, config.data.max_length or '
        'config.sampling.max_new_tokens'
      )

  def divergences(self, params, frozen, student, teacher):
    """Computes divergences of the student from the teacher at each response token.

    Args:
      params: Trained parameters of the student.
      frozen: {'policy': frozen parameters of the student, 'teacher': all of the teacher's}.
      student: Pairs [B, T], as the student reads them.
      teacher: Pairs with the same responses, as the teacher reads them.

    Returns:
      {'loss', 'reverse_kl', 'forward_kl'}, [B, R] float32 each, in nats.
    """
    params = trainable.merge(frozen['policy'], params)
    length = student.response_mask.shape[1]
    states = self.student.response_states(params, student.tokens, student.mask, length)
    teacher_states = self.teacher.response_states(
      frozen['teacher'], teacher.tokens, teacher.mask, length
    )
    # Unembeddings may be padded beyond the ids of the tokenizer, to different sizes.
    vocab = min(self.student.vocab_size, self.teacher.vocab_size)

    def function(*logits):
      kls = {kind: losses.divergence(*logits, kind=kind) for kind in ('reverse_kl', 'forward_kl')}
      return kls | {'loss': losses.divergence(*logits, kind=self.loss, beta=self.beta)}

    return logprobs.compare(
      function,
      lambda hidden: self.student.unembed(params, hidden)[..., :vocab],
      states,
      lambda hidden: self.teacher.unembed(frozen['teacher'], hidden)[..., :vocab],
      teacher_states,
      temperature=self.sampling.temperature,
    )


def train_step(state, frozen, batches, *, models, optimizers, microbatch_size):
  """Takes one optimizer step. Jit it with `state` donated.

  Args:
    state: TrainState with params {'policy': trained parameters of the student}.
    frozen: See Models.divergences.
    batches: Tuple of (Rollout of the student or Pairs of the data, Prompts with which the teacher
      reads their responses, or None if it reads the same prompts).
    models: Models.
    optimizers: {'policy': optax optimizer}.
    microbatch_size: Sequences per forward and backward pass; 0 for all.

  Returns:
    The next TrainState and metrics.
  """
  student = teacher = distillation_data.join([batch for batch, _ in batches])
  if batches[0][1] is not None:
    teacher = distillation_data.join(
      [distillation_data.follow(prompts, batch) for batch, prompts in batches]
    )
  models.check_length(teacher)
  count = jnp.maximum(jnp.sum(student.response_mask), 1)

  def loss_fn(params, pairs):
    divergences = models.divergences(params['policy'], frozen, *pairs)
    means = {
      f'distillation/{name}': adv.masked_sum(values, pairs[0].response_mask) / count
      for name, values in divergences.items()
    }
    return means['distillation/loss'], means

  state, metrics = update.step(
    state, loss_fn, (student, teacher), optimizers=optimizers, microbatch_size=microbatch_size
  )
  rollout = batches[0][0]
  if isinstance(rollout, types.Rollout):
    ended = rollout.ended
    if ended is None:
      ended = sampling_lib.ended(rollout, models.sampling)
    metrics |= {
      'response/length': jnp.mean(jnp.sum(rollout.response_mask, axis=1)),
      'response/eos_rate': jnp.mean(ended),
    }
  return state, metrics


def load_teacher(config, tokenizer, mesh, student, trained, frozen):
  """Returns the Model of the teacher and all of its parameters.

  Args:
    config: Config of the run.
    tokenizer: Tokenizer of the student.
    mesh: Device mesh.
    student: Model of the student.
    trained: Trained parameters of the student, copied if the teacher is the initial student.
    frozen: Frozen parameters of the student, shared with such a teacher.

  Raises:
    UserError: The teacher has another vocabulary, or reads prompts in another way.
  """
  path = config.distillation.teacher
  if not path:
    if student.lora is not None and not config.model.lora.path:  # new adapters have no effect
      return dataclasses.replace(student, lora=None), frozen
    return student, trainable.merge(frozen, jax.tree.map(jnp.copy, trained))
  teacher, params = hf.load(path, mesh=mesh, **setup.load_settings(config.model))
  if teacher.encoder_decoder != student.encoder_decoder:
    raise errors.UserError(
      f'config.distillation.teacher={path!r} is a {teacher.family} model, and the student a '
      f'{student.family} model: both must be decoders, or both encoder-decoders'
    )
  ours, theirs = tokenizer.get_vocab(), tokenizers.load(path).get_vocab()
  differ = sorted(token for token in ours | theirs if ours.get(token) != theirs.get(token))
  if differ:
    raise errors.UserError(
      f'config.distillation.teacher={path!r} has another vocabulary than config.tokenizer or '
      f'config.model.path: {len(differ)} tokens differ, such as {differ[0]!r}, whose ids are '
      f'{theirs.get(differ[0])} and {ours.get(differ[0])}. Use models with the same tokenizer'
    )
  tokenizers.check(tokenizer, teacher.vocab_size)
  return teacher, params


def create(config, mesh):
  """Creates the learner of `config.algorithm = 'distillation'`.

  Args:
    config: Config of the run.
    mesh: Device mesh.

  Returns:
    learner.Learner and the initial TrainState.

  Raises:
    UserError: The data, the models and the config do not fit together.
  """
  tokenizer = setup.load_tokenizer(config)
  model, params = setup.load_policy(config.model, tokenizer, mesh, config.seed)
  model, params, frozen = setup.split_trainable(config, model, params, mesh)
  teacher, teacher_params = load_teacher(config, tokenizer, mesh, model, params, frozen)
  frozen = {'policy': frozen, 'teacher': teacher_params}
  context = setup.policy_context(config, model, tokenizer, mesh, frozen['policy'], params)
  sampling, truncate = evaluators.make_sampling({}, context)
  iterators, prompts, count = distillation_data.make_iterators(config, tokenizer, model)
  actor = None
  if prompts is not None:
    sample = sampler.make(
      model,
      sampling,
      max_concurrent=config.sampling.max_concurrent or 0,
      gather=config.sampling.gather_weights,
    )
    no_scores = lambda rollout, examples: np.full(len(examples), np.nan, np.float32)
    actor = actor_lib.Actor(
      prompts, iterators['prompts'], sample, no_scores, mesh, truncate=truncate
    )
  steps = setup.train_steps(config, count)
  optimizers = {'policy': setup.make_optimizer(config.optim, steps)}
  state = setup.new_state(config.seed, {'policy': params}, optimizers, mesh, model.rules)
  models = Models(model, teacher, config.distillation.loss, config.distillation.beta, sampling)
  step = setup.jit_step(
    train_step,
    state,
    models=models,
    optimizers=optimizers,
    microbatch_size=config.microbatch_size or 0,
  )
  return learner.Learner(
    steps=steps,
    iterators=iterators,
    next_batch=distillation_data.batch_maker(mesh, frozen, actor, iterators),
    train_step=step,
    export=setup.policy_exporter(model, tokenizer, frozen['policy']),
    describe=setup.describer(model, 'policy', tokenizer),
    evaluators=evaluators.make(config.evals, context),
    samples=functools.partial(actor.samples, tokenizer) if actor else lambda metrics: [],
  ), state
