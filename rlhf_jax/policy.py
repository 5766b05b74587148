"""A policy with its tokenizer, used outside of training: texts in, texts out.

Letters: n samples, P prompt length, R response length, T = P + R.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import runtime
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import stored
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.models import q_functions
from rlhf_jax.models import trainable
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import guided
from rlhf_jax.rollout import sampler
from rlhf_jax.rollout import stops

BATCH_SIZE = 256  # sequences sampled or scored at a time; the last scored batch is padded to it
DEFAULT_NEW_TOKENS = 128  # longest response by default, in tokens
# Keeps the jitted samplers of the 16 most recent settings.
_sampler = functools.lru_cache(maxsize=16)(sampler.make)


@dataclasses.dataclass
class Samples:
  """n prompts, their n responses, and a Rollout of NumPy arrays with the tokens of both."""

  prompts: list[str]
  responses: list[str]
  rollout: types.Rollout

  def __len__(self):
    return len(self.prompts)

  def to_pandas(self):
    """Returns a DataFrame with the columns prompt and response."""
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
    """Returns the samples at positions `index`."""
    return Samples(
      [self.prompts[i] for i in index],
      [self.responses[i] for i in index],
      jax.tree.map(lambda x: x[np.asarray(index)], self.rollout),
    )


@dataclasses.dataclass
class TextPolicy:
  """A language model with its tokenizer.

  Attributes:
    model: Model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    path: Its Hugging Face folder; None if it has none, for example if loaded from a checkpoint.
    q_functions: Q functions that ILQL trained with it, see models/q_functions.py; None if there are
      none.
    beta: Default of `sample`.
    step: Step of the checkpoint it was loaded from; None if it was loaded from a finished model.
  """

  model: Any
  params: Any
  tokenizer: Any
  path: pathlib.Path | None = None
  q_functions: Any = None
  beta: float = 0.0
  step: int | None = None

  def __post_init__(self):
    if self.model.encoder_decoder:
      tokenizers.set_encoder_decoder(self.tokenizer)

  @classmethod
  def load(cls, path, *, beta=0.0):
    """Loads a Hugging Face folder, a finished run, or the newest checkpoint of an unfinished run.

    Args:
      path: The folder.
      beta: Default of `sample`.

    Raises:
      UserError: There is nothing to load.
    """
    path = pathlib.Path(path)
    runtime.enable_compilation_cache()
    if (path / 'model').is_dir() or not (path / 'checkpoints').is_dir():
      return cls(
        *hf.load(path, unroll=None),
        tokenizers.load(path),
        folders.find_model(path),
        q_functions.load(path),
        beta,
      )
    fields = json.loads((path / 'model.json').read_text())
    name = fields.pop('name')
    if name != 'policy':
      raise errors.UserError(f'{path} trains a {name} model, which cannot generate text')
    model, (step, params) = models.create(fields, unroll=None), checkpoint.load_newest(path, name)
    config = json.loads((path / 'config.json').read_text())['model']
    if config['lora']['targets'] or config['lora']['path'] or config['unfrozen_layers'] is not None:
      params = _with_frozen(path, config, model, params)
    return cls(model, params, tokenizers.load(path / 'tokenizer'), beta=beta, step=step)

  def read_prompts(self, path):
    """Returns the texts of the prompts of a data set, as training reads them; see `formats`."""
    return [example.prompt for example in self.read_examples(path)]

  def read_examples(self, path):
    """Returns the prompts of a data set with their other columns, a list of formats.Prompt."""
    try:
      examples, _ = formats.prompts(sources.read(path), tokenizer=self.tokenizer)
    except errors.DataError as error:  # there is no config.data to change here
      raise errors.DataError(str(error).removesuffix(formats.SKIP_HINT)) from error
    return list(examples)

  def save(self, path):
    """Saves a Hugging Face folder with the tokenizer, which `load` and transformers can read."""
    files = q_functions.files(self.q_functions) if self.q_functions else None
    hf.save(pathlib.Path(path), self.model, self.params, tokenizer=self.tokenizer, files=files)
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
    beta=None,
    prompt_length=None,
  ):
    """Samples responses to prompts. The result does not depend on how prompts are batched.

    Args:
      prompts: List of n texts.
      key: Random key, or an int seed.
      max_new_tokens: R; None for the rest of the context, at most 128.
      temperature: Temperature of sampling; 0 takes the most likely token.
      top_k: See sampling.Sampling.
      top_p: See sampling.Sampling.
      ignore_eos: Whether to continue after the EOS.
      min_new_tokens: Number of tokens before the EOS or the end of a stop string may appear.
      stop: Strings that end a response and stay in it. See stops.truncate_at_strings.
      truncate_at: Text of a single token that ends a response instead of the EOS. Sampling
        continues past both, and `rollout.ended` tells which responses have this token. None for the
        EOS. See stops.truncate.
      truncate_after: First position at which `truncate_at` ends a response.
      samples: Number of responses per prompt.
      beta: Weight of the Q functions of ILQL, which are added to the logits; 0 samples from the
        policy alone. None for `self.beta`.
      prompt_length: P, the length that prompts are padded to; None for the longest prompt. A length
        that does not vary from call to call is compiled once.

    Returns:
      Samples; the responses to the same prompt are adjacent.

    Raises:
      UserError: A prompt has no tokens, a stop string is empty, `truncate_at` is not one token,
        prompt and response exceed the model's context, or there are no Q functions for `beta`.
    """
    if isinstance(prompts, str):
      raise errors.UserError('prompts is a string; pass a list of strings')
    key = jax.random.key(key) if isinstance(key, int) else key
    rows = tokenizers.encode(self.tokenizer, prompts)
    if not all(map(len, rows)):
      raise errors.UserError('a prompt is empty and this tokenizer has no BOS; pass a text')
    length = max(prompt_length or 0, *map(len, rows))
    if max_new_tokens is None:
      max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, self.model.max_length - length))
    if length + max_new_tokens > self.model.max_length:
      raise errors.UserError(
        f'a prompt of {length} tokens and {max_new_tokens} new ones exceed the context of '
        f'{self.model.max_length} tokens: shorten the prompt or lower max_new_tokens'
      )
    sampling = stops.sampling_of(
      self.tokenizer,
      stop=stop,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      ignore_eos=ignore_eos or truncate_at is not None,
      min_new_tokens=min_new_tokens,
    )
    model, params = self._guided(self.beta if beta is None else beta)
    generate = _sampler(
      model,
      sampling,
      samples=samples,
      max_concurrent=BATCH_SIZE if len(prompts) * samples > BATCH_SIZE else 0,
    )
    padded = learned.left_padded(rows, length, self.tokenizer.pad_token_id)
    rollout = jax.device_get(generate(params, padded, key))
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

  def _guided(self, beta):
    """Returns the model to sample with and its parameters; see `sample`."""
    if not beta:
      return self.model, self.params
    errors.need(
      self.q_functions,
      f'beta={beta} needs Q functions, which this policy does not have: load a finished run of '
      'ilql, or set beta to 0',
    )
    errors.need(beta > 0, f'beta={beta} must be 0 or positive')
    model = guided.GuidedModel(self.model, beta, 'backbone' in self.q_functions)
    return model, {'policy': self.params} | self.q_functions

  def _responses(self, prompts, rollout):
    response = rollout.tokens[:, -rollout.response_mask.shape[1] :]
    ids = [row[keep] for row, keep in zip(response, rollout.response_mask)]
    texts = tokenizers.decode_continuation(self.tokenizer, ids)
    # After an empty prompt the response starts the text, so it must not begin with the space that
    # some tokenizers put before words.
    return [
      text if prompt else self.tokenizer.decode(row, skip_special_tokens=True)
      for prompt, text, row in zip(prompts, texts, ids)
    ]

  def chat(self, messages, key=0, *, max_new_tokens=None, temperature=1.0):
    """Samples the assistant's next message, with the tokenizer's chat template.

    Args:
      messages: List of {'role': ..., 'content': ...} that ends with a user message, or a text from
        the user.
      key: Random key, or an int seed.
      max_new_tokens: See `sample`.
      temperature: See `sample`.

    Returns:
      The text of the message.

    Raises:
      UserError: The tokenizer has no chat template, or the template rejects the messages.
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
    """Computes the log-probability of each response, summed over its tokens, [n] float32.

    No EOS is added to the responses.

    Args:
      prompts: List of n texts.
      responses: List of n texts.
      temperature: Positive number that divides the logits.
    """
    prompts = tokenizers.encode(self.tokenizer, prompts)
    responses = tokenizers.encode_continuation(self.tokenizer, responses)
    rollout = learned.rollout_of(
      prompts,
      responses,
      (max(map(len, prompts)), max(1, *map(len, responses))),
      self.tokenizer.pad_token_id,
    )
    return self.rollout_logprobs(rollout, temperature=temperature)

  def rollout_logprobs(self, rollout, *, temperature=1.0):
    """Computes the log-probability of each response of a rollout, summed over tokens, [n] float32.

    Args:
      rollout: Rollout of n sequences.
      temperature: Positive number that divides the logits.
    """
    return in_batches(
      lambda batch, start: forward.response_logprobs(
        self.params, batch, temperature, model=self.model
      ),
      rollout,
    )


def _with_frozen(path, config, model, trained):
  """Returns all parameters of a policy whose checkpoint holds only the trained ones.

  Args:
    path: Folder of the run.
    config: Its `config.model`.
    model: Model without adapters.
    trained: Parameters from its checkpoint.
  """
  if not config['path']:
    raise errors.UserError(
      f'{path}: its checkpoints hold only the trained part of the model, and config.model.path is '
      'empty, so the frozen part is not available; wait until the run is finished'
    )
  _, params = hf.load(config['path'])
  model, _, frozen = trainable.set_up(
    model, params, unfrozen_layers=config['unfrozen_layers'], seed=0, **config['lora']
  )
  # Restored arrays are on the devices of the run; arrays from the folder are on one device.
  return trainable.merge_lora(model, jax.device_get(trained), frozen)


def in_batches(function, tree):
  """Applies `function(batch, index of its first row)` to BATCH_SIZE rows at a time.

  Args:
    function: Function of a tree and an int that returns a tree.
    tree: Tree of NumPy arrays [n, ...].

  Returns:
    Tree of NumPy arrays [n, ...].
  """
  count = jax.tree.leaves(tree)[0].shape[0]
  size = min(BATCH_SIZE, count)
  parts = []
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)
    out = function(jax.tree.map(lambda x: x[index], tree), start)
    parts.append(jax.tree.map(lambda x: np.asarray(x)[: count - start], out))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)
