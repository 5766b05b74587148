"""Rewards of a data set by a scorer, computed once and kept for later runs.

The file is in the user's cache. Its name is a fingerprint of the texts, the tokenizer's ids of
them, the keys of the reward, the version of this package, and the weights of reward models or the
module of a function: if one of them changes, new rewards are computed. Changes of other modules
that the function uses are not noticed. The rewards of a server, and of a function that is in no
module, are not kept.

Letters: N episodes, P prompt length, R response length.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pathlib
import sys
from typing import Any

from absl import logging
import jax
from jaxtyping import Float, Int
import ml_collections
import numpy as np
import transformers

from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import identity
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import derived
from rlhf_jax.data import formats
from rlhf_jax.data import mixtures
from rlhf_jax.data import progress
from rlhf_jax.data import tokenizers
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import scorers


def has_source(block: ml_collections.ConfigDict) -> bool:
  """Returns whether a block with the keys of scorers.config names a reward."""
  return any(block.get(name) for name in (*scorers.SOURCES, 'parts'))


@dataclasses.dataclass(frozen=True)
class Answers:
  """The last answers of N episodes, and what comes before them, as a scorer reads them.

  Attributes:
    examples: N Prompts, whose text is everything before the answer.
    prompts: N arrays of their token ids.
    answers: N arrays of the token ids of the answers, with the EOS.
  """

  examples: list[formats.Prompt]
  prompts: list[np.ndarray]
  answers: list[np.ndarray]

  @classmethod
  def of(
    cls, episodes: Sequence[formats.Episode], tokenizer: transformers.PreTrainedTokenizerFast
  ) -> 'Answers':
    """Tokenizes the texts of episodes."""
    before = [''.join(episode.parts[:-1]) for episode in episodes]
    answers = tokenizers.encode_continuation(tokenizer, [e.parts[-1] for e in episodes])
    return cls(
      [formats.Prompt(text, episode.metadata) for text, episode in zip(before, episodes)],
      tokenizers.encode(tokenizer, before),
      [tokenizers.append_eos(tokenizer, ids) for ids in answers],
    )

  @property
  def lengths(self) -> tuple[int, int]:
    """(P, R), the numbers of tokens of the longest prompt and of the longest answer."""
    return max(map(len, self.prompts)), max(map(len, self.answers))

  def rollout(self, index: Int[np.ndarray, ' n'], pad_id: int) -> types.Rollout:
    """Returns the answers at some indices as a Rollout of NumPy arrays."""
    choose = lambda rows: [rows[i] for i in index]
    return learned.rollout_of(choose(self.prompts), choose(self.answers), self.lengths, pad_id)


def label(
  episodes: Sequence[formats.Episode],
  config_reward: ml_collections.ConfigDict,
  tokenizer: transformers.PreTrainedTokenizerFast,
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  load: dict[str, Any],
) -> Sequence[formats.Episode]:
  """Returns episodes with the rewards that a scorer gives to their last answers.

  Args:
    episodes: N Episodes without rewards.
    config_reward: See scorers.config.
    tokenizer: Tokenizer of the policy.
    mesh: Device mesh.
    batch_size: Answers scored at a time.
    load: See scorers.make.

  Returns:
    Episodes, those of a mixture as a mixture; those whose reward is NaN are left out if
    `config_reward` says so.

  Raises:
    UserError: The scorer fails, or rewards the tokens of a conversation with several answers.
  """
  listed = list(episodes)
  if not listed:
    return []
  answers = Answers.of(listed, tokenizer)
  path = cache_path(answers, config_reward) if cacheable(config_reward) else None
  rewards = read(path) if path else None
  if not processes.all_true(rewards is not None):
    score = _make_scorer(answers, config_reward, tokenizer, mesh, load)
    rewards = score_in_batches(score, answers, batch_size, tokenizer.pad_token_id, mesh)
    if path:
      write(path, rewards)
  kept = np.flatnonzero([not np.isnan(reward).any() for reward in rewards])
  if len(kept) < len(listed):
    logging.warning('%d episodes whose reward is NaN are left out', len(listed) - len(kept))
  rewarded = lambda i: _rewarded(listed[i], rewards[i], len(answers.answers[i]))
  if isinstance(episodes, mixtures.Mixture):
    parts = [[*map(rewarded, indices)] for indices in episodes.split(kept)]
    return episodes.with_parts(parts)
  return [*map(rewarded, kept)]


def _rewarded(episode, reward, length):
  """Returns an episode with its reward, a number or an array with one number per token."""
  if not reward.ndim:
    return dataclasses.replace(episode, rewards=(float(reward),), level='episode')
  errors.need(
    len(episode.parts) == 2,
    'config.reward rewards tokens, but the data has conversations with several answers: use a '
    'reward that returns one number',
  )
  rewards = tuple(reward[:length].tolist())
  return dataclasses.replace(episode, rewards=rewards, level='token')


def _blocks(config_reward):
  """Returns the block of a reward and those of its parts."""
  return (config_reward, *(config_reward.get('parts') or {}).values())


def cacheable(config_reward: ml_collections.ConfigDict) -> bool:
  """Returns whether a reward has files that tell when it changes: no server, nothing in memory."""
  return not any(
    block.get('url') or (block.get('function') or '').startswith(functions.IN_MEMORY)
    for block in _blocks(config_reward)
  )


def cache_path(answers: Answers, config_reward: ml_collections.ConfigDict) -> pathlib.Path:
  """Returns the path of the file with the rewards of a data set; see the top of this file."""
  digest = hashlib.sha256()
  for example, *ids in zip(answers.examples, answers.prompts, answers.answers):
    record = [example.prompt, example.metadata, *(row.tolist() for row in ids)]
    digest.update(json.dumps(record, default=repr).encode('utf-8', 'surrogatepass'))
  keys = [identity.version(), config_reward.to_dict()]
  digest.update(json.dumps(keys, sort_keys=True, default=repr).encode())
  for block in _blocks(config_reward):
    for folder in filter(None, (block.get('model'), *(block.get('models') or ()))):
      for file in sorted(pathlib.Path(folder).rglob('*.safetensors')):
        digest.update(derived.fingerprint(os.fspath(file)).encode())
    if block.get('function'):
      digest.update(_code(block.function))
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(cache) / 'rlhf_jax' / 'rewards' / f'{digest.hexdigest()[:32]}.npy'


def _code(name: str) -> bytes:
  """Returns the code of the module that has 'package.module:function', and of that defining it."""
  function = functions.load(name)
  if not (inspect.isroutine(function) or inspect.isclass(function)):
    function = type(function)  # of a callable object
  code = b''
  for place in (sys.modules[name.partition(':')[0]], function):
    with contextlib.suppress(TypeError, OSError):  # written in C, or without a file
      code += pathlib.Path(inspect.getsourcefile(place)).read_bytes()
  return code


def _make_scorer(answers, config_reward, tokenizer, mesh, load):
  """Creates the scorer of `config_reward`; a reward model must have room for all answers."""
  longest = sum(answers.lengths)

  def check(model):
    errors.need(
      longest <= model.max_length,
      f'prompts and answers of up to {longest} tokens exceed the context of the reward model, '
      f'{model.max_length} tokens: shorten them, or use another reward model',
    )

  skip = scorers.skips_nan(config_reward)
  return scorers.make(config_reward, tokenizer, mesh, load=load, check=check, allow_nan=skip)[0]


def score_in_batches(
  score: scorers.Scorer, answers: Answers, size: int, pad_id: int, mesh: jax.sharding.Mesh
) -> Float[np.ndarray, ' N *R']:
  """Returns the rewards of all answers; the last batch is filled with copies of the last answer.

  Args:
    score: Scorer.
    answers: Answers.
    size: Answers scored at a time.
    pad_id: Id of the padding token.
    mesh: Device mesh.
  """
  count, found = len(answers.examples), []
  for start in progress.bar(range(0, count, size), 'rewards of the data', 'batches'):
    index = np.minimum(np.arange(start, start + size), count - 1)
    rollout = sharding.put_rows(answers.rollout(index, pad_id), mesh)
    scores = types.Scores.of(score(rollout, [answers.examples[i] for i in index]))
    found.append(processes.to_host(scores.total)[: count - start])
  return np.concatenate(found)


def read(path: pathlib.Path) -> np.ndarray | None:
  """Returns rewards that `write` has written; None if there is no file or it is damaged."""
  try:
    return np.load(path)
  except (OSError, ValueError, EOFError):
    return None


def write(path: pathlib.Path, rewards: np.ndarray) -> None:
  """Writes rewards atomically; a cache that cannot be written is only a warning."""
  try:
    with folders.replacing(path) as stream:
      np.save(stream, rewards)
  except OSError as error:
    logging.warning('%s: the rewards of the data cannot be kept (%s)', path, error)
