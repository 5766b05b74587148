"""The batches of distillation: what the student and the teacher read.

Student and teacher read the same responses. With a context, the teacher reads other prompts. Their
iterators give the same examples in the same order, because both shuffle as many examples with the
same seed.

Letters: B batch, P prompt length, R response length, T = P + R.
"""

import os

import jax
import jax.numpy as jnp

from rlhf_jax import errors
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import on_policy_config
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.models import trainable


def sample_count(config):
  """Returns the number of responses in a batch that the student samples."""
  return round(config.distillation.student_fraction * config.batch_size)


def read(config, convert, tokenizer):
  """Reads the examples of `config.data`.

  Args:
    config: Config of the run.
    convert: formats.prompts or formats.completions.
    tokenizer: Tokenizer.

  Returns:
    The examples, and the same examples after `config.distillation.context`, for the teacher; None
    without a context.

  Raises:
    UserError: The data cannot be read, or some records cannot follow a context.
  """
  examples, context = setup.read_examples(config.data, convert, tokenizer), read_context(config)
  if not context:
    return examples, None
  convert = formats.in_context(convert, context)
  in_context = setup.read_examples(config.data, convert, tokenizer)
  if len(in_context) != len(examples):
    raise errors.UserError(
      f'config.data.path={config.data.path!r}: {len(examples)} records can be used without '
      f'config.distillation.context, but {len(in_context)} with it. Remove the records whose '
      'messages the chat template rejects after a message of the system'
    )
  return examples, in_context


def read_context(config):
  """Returns the text of `config.distillation.context`; '' if there is none.

  Raises:
    UserError: It looks like the path of a file, but there is no such file; or the file is empty or
      not UTF-8.
  """
  context = config.distillation.context or ''
  key = f'config.distillation.context={errors.brief(context)!r}'
  if not os.path.isfile(context):
    errors.need(
      not context or not _is_path(context),
      f'{key}: no such file. A text must have several words, and not begin with /, ./ or ~ or end '
      'with .txt',
    )
    return context
  try:
    with open(context, encoding='utf-8') as stream:
      text = stream.read()
  except UnicodeDecodeError as error:
    raise errors.UserError(f'{key}: not UTF-8 ({error}). Save the file as UTF-8') from error
  errors.need(text.strip(), f'{key}: the file is empty, so the teacher would read no context')
  return text


def _is_path(text):
  """Returns whether a text looks like the path of a file: one word, or one line like '/my file'."""
  if len(text.split()) <= 1:
    return True
  return '\n' not in text and (text.startswith(('/', './', '~')) or text.endswith('.txt'))


def make_iterators(config, tokenizer, model):
  """Creates the iterators over prompts to answer and over completions of the data.

  Args:
    config: Config of the run.
    tokenizer: Tokenizer.
    model: Model of the student.

  Returns:
    iterators: 'prompts' over (Prompts, indices) and 'data' over Pairs, if they are used. With a
      context, 'teacher_prompts' and 'teacher_data' over (Prompts, indices) of the same examples.
    prompts: List of formats.Prompt; None if the student samples nothing.
    count: config.batch_size times the train steps of an epoch, which reads each completion once, or
      each prompt if the student samples all responses.

  Raises:
    UserError: The data cannot be read or does not fit the model's context.
  """
  iterators, prompts, samples = {}, None, sample_count(config)
  shared = {'tokenizer': tokenizer, 'seed': config.seed}

  def add_teacher(name, examples, batch_size):
    if examples is not None:
      length = pipelines.longest_prompt(examples, tokenizer)
      iterators[name], _ = pipelines.prompt_iterator(
        examples, batch_size=batch_size, max_prompt_length=length, **shared
      )

  if samples:
    on_policy_config.check_length(config, model)
    prompts, in_context = read(config, formats.prompts, tokenizer)
    iterators['prompts'], count = pipelines.prompt_iterator(
      prompts,
      batch_size=samples,
      max_prompt_length=config.data.max_prompt_length,
      on_long=config.data.on_long,
      **shared,
    )
    add_teacher('teacher_prompts', in_context, samples)
  if samples < config.batch_size:
    setup.check_length(config.data.max_length, model, 'data.max_length')
    completions, in_context = read(config, formats.completions, tokenizer)
    size = config.batch_size - samples
    iterators['data'], count = pipelines.completion_iterator(
      completions, batch_size=size, max_length=config.data.max_length, pairs=True, **shared
    )
    count = count * config.batch_size / size
    add_teacher('teacher_data', in_context, size)
  return iterators, prompts, count


def batch_maker(mesh, frozen, actor, iterators):
  """Returns `Learner.next_batch`, which samples responses and reads completions.

  Args:
    mesh: Device mesh.
    frozen: See distillation.Models.divergences.
    actor: Actor of the student; None if it samples nothing.
    iterators: See `make_iterators`.
  """
  put = lambda batch: sharding.put_rows(batch, mesh)
  prompts = lambda name: put(next(iterators[name])[0]) if name in iterators else None

  def next_batch(state, *, timed):
    batches, metrics = [], {}
    if actor is not None:
      policy = trainable.merge(frozen['policy'], state.params['policy'])
      rollout, _, metrics = actor(policy, types.step_keys(state)[0], timed=timed)
      batches.append((rollout, prompts('teacher_prompts')))
    if 'data' in iterators:
      batches.append((put(next(iterators['data'])), prompts('teacher_data')))
    return (frozen, tuple(batches)), metrics

  return next_batch


def follow(prompts, batch):
  """Returns the responses of a batch, a Rollout or Pairs, after other Prompts, as Pairs."""
  length = batch.response_mask.shape[1]
  after = lambda prompt, both: jnp.concatenate([prompt, both[:, -length:]], axis=1)
  return types.Pairs(
    after(prompts.tokens, batch.tokens), after(prompts.mask, batch.mask), batch.response_mask
  )


def join(batches):
  """Concatenates batches, Rollouts or Pairs, to Pairs padded to their longest P and longest R."""
  response = max(batch.response_mask.shape[1] for batch in batches)
  prompt = max(batch.tokens.shape[1] - batch.response_mask.shape[1] for batch in batches)

  def padded(batch):
    right = response - batch.response_mask.shape[1]
    left = prompt + response - right - batch.tokens.shape[1]
    pad = lambda x, left: jnp.pad(x, ((0, 0), (left, right)))
    return types.Pairs(pad(batch.tokens, left), pad(batch.mask, left), pad(batch.response_mask, 0))

  joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *map(padded, batches))
  return sharding.shard_rows(joined)
