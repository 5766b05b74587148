"""A policy with its tokenizer: texts in, texts out, outside of training.

Letters: n samples, P prompt length, R response length, T = P + R.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import logprobs
from rlhf_jax import models
from rlhf_jax import runtime
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import stored
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.models import trainable
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import sampling as sampling_lib
from rlhf_jax.rollout import stops

BATCH = 256  # responses decoded or scored at a time; the last batch of what is scored is filled up
NEW_TOKENS = 128  # of a response, where nobody says
# Jitted functions of the settings asked for last.
_sampler = functools.lru_cache(maxsize=16)(sampler.make)


@dataclasses.dataclass
class Samples:
  """n prompts, their responses, and the tokens of both as a Rollout of NumPy arrays."""

  prompts: list[str]
  responses: list[str]
  rollout: types.Rollout

  def __len__(self):
    return len(self.prompts)

  def to_pandas(self):
    """A DataFrame with the columns prompt and response."""
    import pandas

    return pandas.DataFrame({'prompt': self.prompts, 'response': self.responses})

  def __repr__(self):
    return repr(self.to_pandas())

  def _repr_html_(self):
    return self.to_pandas().to_html()

  @property
  def response_tokens(self):
    """The token ids of each response, n lists of int."""
    mask = self.rollout.response_mask
    return [row[keep].tolist() for row, keep in zip(self.rollout.tokens[:, -mask.shape[1] :], mask)]

  def take(self, index):
    """The samples at positions `index`."""
    return Samples(
      [self.prompts[i] for i in index],
      [self.responses[i] for i in index],
      jax.tree.map(lambda x: x[np.asarray(index)], self.rollout),
    )


@dataclasses.dataclass
class TextPolicy:
  """A language model that can be asked for texts.

  Attributes:
    model: Model.
    params: its parameters.
    tokenizer: its tokenizer.
    path: its Hugging Face folder, a pathlib.Path; None if it has none, as a checkpoint.
  """

  model: Any
  params: Any
  tokenizer: Any
  path: pathlib.Path | None = None

  def __post_init__(self):
    if self.model.encoder_decoder:
      tokenizers.set_encoder_decoder(self.tokenizer)

  @classmethod
  def load(cls, path):
    """From a Hugging Face folder, a finished run, or the newest checkpoint of an unfinished one.

    Raises:
      UserError: there is nothing to load.
    """
    path = pathlib.Path(path)
    runtime.enable_compilation_cache()
    if (path / 'model').is_dir() or not (path / 'checkpoints').is_dir():
      return cls(*hf.load(path, unroll=None), tokenizers.load(path), folders.model(path))
    fields = json.loads((path / 'model.json').read_text())
    name = fields.pop('name')
    if name != 'policy':
      raise errors.UserError(f'{path} trains a {name} model, which generates no text')
    model, params = models.create(fields, unroll=None), checkpoint.load_params(path, name)
    config = json.loads((path / 'config.json').read_text())['model']
    if config['lora']['targets'] or config['lora']['path'] or config['unfrozen_layers'] is not None:
      params = _with_frozen(path, config, model, params)
    return cls(model, params, tokenizers.load(path / 'tokenizer'))

  def read_prompts(self, path):
    """Texts of the prompts of a data set, as training reads them; see `formats`."""
    return [example.prompt for example in self.read_examples(path)]

  def read_examples(self, path):
    """The prompts of a data set with their other columns, a list of formats.Prompt."""
    try:
      examples, _ = formats.prompts(sources.read(path), tokenizer=self.tokenizer)
    except errors.DataError as error:  # no config.data says what to do about it here
      raise errors.DataError(str(error).removesuffix(formats.SKIP_HINT)) from error
    return list(examples)

  def save(self, path):
    """Writes a Hugging Face folder with the tokenizer, which `load` and transformers read."""
    hf.save(pathlib.Path(path), self.model, self.params, tokenizer=self.tokenizer)
    self.path = pathlib.Path(path)

  def sample(
    self,
    prompts,
    key=0,
    *,
    max_new_tokens=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    ignore_eos=False,
    min_new_tokens=0,
    stop=(),
    truncate_at=None,
    truncate_after=0,
    samples=1,
  ):
    """Samples responses to prompts, the same in one batch or a few at a time.

    Args:
      prompts: texts.
      key: random key, or the int that seeds one.
      max_new_tokens: R; None for what the context leaves, 128 at most.
      temperature: 0 takes the likeliest token.
      top_k: see sampling.Sampling.
      top_p: see sampling.Sampling.
      ignore_eos: go on past the end.
      min_new_tokens: tokens before the first that may be the EOS or complete a stop string.
      stop: strings that end a response; they stay in it. See stops.truncate_at_strings.
      truncate_at: text of the token that ends a response in place of the EOS; sampling goes past
        both, and `rollout.ended` says which responses have it. None: the EOS. See stops.truncate.
      truncate_after: the first position at which it does.
      samples: responses to each prompt.

    Returns:
      Samples, those of a prompt one after another.

    Raises:
      UserError: a prompt has no token, a stop string is empty, `truncate_at` is not one token, or
        prompt and response exceed the model's context.
    """
    if isinstance(prompts, str):
      raise errors.UserError('prompts is a string: give a list of strings')
    key = jax.random.key(key) if isinstance(key, int) else key
    rows = tokenizers.encode(self.tokenizer, prompts)
    if not all(map(len, rows)):
      raise errors.UserError('the prompt is empty and this tokenizer has no BOS: give a prompt')
    length = max(map(len, rows))
    if max_new_tokens is None:
      max_new_tokens = max(1, min(NEW_TOKENS, self.model.max_length - length))
    if length + max_new_tokens > self.model.max_length:
      raise errors.UserError(
        f'a prompt of {length} tokens and {max_new_tokens} new ones exceed the context of '
        f'{self.model.max_length} tokens: shorten the prompt or lower max_new_tokens'
      )
    # Before `min_new_tokens` stop tokens cannot be drawn; strings can be there, but end nothing.
    single = {} if min_new_tokens else stops.single_tokens(self.tokenizer, stop)
    sampling = sampling_lib.Sampling(
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      eos_id=self.tokenizer.eos_token_id,
      pad_id=self.tokenizer.pad_token_id,
      ignore_eos=ignore_eos or truncate_at is not None,
      min_new_tokens=min_new_tokens,
      stop_tokens=tuple(single.values()),
    )
    generate = _sampler(
      self.model,
      sampling,
      samples=samples,
      max_concurrent=BATCH if len(prompts) * samples > BATCH else 0,
    )
    padded = left_padded(rows, length, self.tokenizer.pad_token_id)
    rollout = jax.device_get(generate(self.params, padded, key))
    if stop:
      rollout, _ = stops.truncate_at_strings(rollout, self.tokenizer, stop, after=min_new_tokens)
    if truncate_at is not None:
      token = stops.single_token(self.tokenizer, truncate_at, name='truncate_at')
      rollout, ended = jax.device_get(
        stops.truncate(
          rollout, tokens=(token,), after=truncate_after, pad_id=self.tokenizer.pad_token_id
        )
      )
      rollout = rollout.replace(ended=ended)
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    return Samples(prompts, self._responses(prompts, rollout), rollout)

  def _responses(self, prompts, rollout):
    response = rollout.tokens[:, -rollout.response_mask.shape[1] :]
    ids = [row[keep] for row, keep in zip(response, rollout.response_mask)]
    texts = tokenizers.decode_continuation(self.tokenizer, ids)
    # A text that begins here has no space in front, which some tokenizers put before words.
    return [
      text if prompt else self.tokenizer.decode(row, skip_special_tokens=True)
      for prompt, text, row in zip(prompts, texts, ids)
    ]

  def chat(self, messages, key=0, *, max_new_tokens=None, temperature=1.0):
    """Samples the assistant's next message, by the tokenizer's chat template.

    Args:
      messages: list of {'role': ..., 'content': ...}, the last one the user's; or the user's text.
      key: random key, or the int that seeds one.
      max_new_tokens: see `sample`.
      temperature: see `sample`.

    Returns:
      The message, a text.

    Raises:
      UserError: the tokenizer has no chat template, or it rejects the messages.
    """
    if isinstance(messages, str):
      messages = [{'role': 'user', 'content': messages}]
    record = stored.Record({'messages': messages}, 'the messages')
    examples, _ = formats.prompts([record], tokenizer=self.tokenizer)
    samples = self.sample(
      [examples[0].prompt], key, max_new_tokens=max_new_tokens, temperature=temperature
    )
    return samples.responses[0]

  def logprobs(self, prompts, responses, *, temperature=1.0):
    """Log-probability of each response, summed over its tokens, [n] float32.

    No EOS is added to the responses.

    Args:
      prompts: n texts.
      responses: n texts.
      temperature: what the logits are divided by; positive.
    """
    prompts = tokenizers.encode(self.tokenizer, prompts)
    responses = tokenizers.encode_continuation(self.tokenizer, responses)
    pad = self.tokenizer.pad_token_id
    left = left_padded(prompts, max(map(len, prompts)), pad)
    tokens, mask = learned.right_padded(responses, max(1, *map(len, responses)), pad)
    rollout = types.Rollout(
      tokens=np.concatenate([left.tokens, tokens], axis=1),
      mask=np.concatenate([left.mask, mask], axis=1),
      response_mask=mask,
      logprobs=np.zeros(mask.shape, np.float32),
    )
    return self.rollout_logprobs(rollout, temperature=temperature)

  def rollout_logprobs(self, rollout, *, temperature=1.0):
    """Log-probability of each response of a rollout, summed over its tokens, [n] float32.

    Args:
      rollout: Rollout of n sequences.
      temperature: what the logits are divided by; positive.
    """
    return in_batches(
      lambda batch, start: response_logprobs(self.params, batch, temperature, model=self.model),
      rollout,
    )


def _with_frozen(path, config, model, trained):
  """All parameters of a policy of whose checkpoint only the trained ones are a part.

  Args:
    path: the run's folder.
    config: its `config.model`.
    model: Model, without adapters.
    trained: from its checkpoint.
  """
  if not config['path']:
    raise errors.UserError(
      f'{path} trains a part of a model that is in no folder (config.model.path is empty), and its '
      'checkpoints hold that part alone; wait for its end'
    )
  _, params = hf.load(config['path'])
  model, _, frozen = trainable.set_up(
    model, params, unfrozen_layers=config['unfrozen_layers'], seed=0, **config['lora']
  )
  # Restored arrays lie on the devices of the run, the folder's on one.
  return trainable.merge_lora(model, jax.device_get(trained), frozen)


@functools.partial(jax.jit, static_argnames=('model',))
def response_logprobs(params, rollout, temperature, *, model):
  """Log-probability of each response, summed over its tokens, [n] float32.

  Args:
    params: all parameters of `model`.
    rollout: Rollout of n sequences.
    temperature: what the logits are divided by; positive.
    model: Model.
  """
  response_length = rollout.response_mask.shape[1]
  states = model.response_states(params, rollout.tokens, rollout.mask, response_length)
  values, _ = logprobs.token_logprobs(
    functools.partial(model.unembed, params),
    states,
    rollout.tokens[:, -response_length:],
    temperature=temperature,
  )
  return jnp.sum(jnp.where(rollout.response_mask, values, 0.0), axis=1)


def in_batches(function, tree):
  """Applies `function(batch, first row)` to BATCH rows at a time; NumPy in, NumPy out."""
  count = jax.tree.leaves(tree)[0].shape[0]
  size = min(BATCH, count)
  parts = []
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)
    out = function(jax.tree.map(lambda x: x[index], tree), start)
    parts.append(jax.tree.map(lambda x: np.asarray(x)[: count - start], out))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def left_padded(rows, length, pad_id):
  """Prompts [n, length] of token rows."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
    mask[i, length - len(row) :] = True
  return types.Prompts(tokens, mask)
