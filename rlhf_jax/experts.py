"""Experts: adapters of one base model, each trained on data of its own.

They are merged with weights into one model, or for each prompt the expert is chosen whose training
prompts are nearest to it. See Jang et al. 2023, "Exploring the Benefits of Training Expert Language
Models over Instruction Tuning" (ELM, https://arxiv.org/abs/2302.03202).

Where we differ from ELM:

- They average the weights of experts; we add the weighted sum of the adapters, which need not have
  the same targets or ranks. With weights 1 / n, it is the average of the merged models.
- They compare sentence embeddings and choose one expert for a task, the one retrieved most often
  over its examples; we compare the character n-grams of texts and choose an expert for each prompt.
"""

from collections.abc import Sequence
import dataclasses
import pathlib

from absl import logging
import numpy as np
from sklearn.feature_extraction import text as features

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft

EXAMPLES = 100  # training prompts of each expert to compare with, as in ELM
NEIGHBOURS = 20  # nearest training prompts that vote


def find_adapter(path):
  """Returns the folder of an adapter: the path itself, or `adapter/` in the folder of a run.

  Raises:
    UserError: There is no adapter.
  """
  path = pathlib.Path(path)
  folder = path if (path / peft.CONFIG).exists() else path / 'adapter'
  errors.need(
    (folder / peft.CONFIG).exists(),
    f'{path}: holds no adapter ({peft.CONFIG}). Name the folder of an adapter, or of a run that '
    'trained one with config.model.lora.targets.',
  )
  return folder


def combine(base, adapters):
  """Combines adapters of a base model into one adapter, without rounding: see lora.weighted_sum.

  Args:
    base: TextPolicy of the base model.
    adapters: (folder of an adapter or of a run, weight) of each.

  Returns:
    Model with its Lora, and adapters.

  Raises:
    UserError: A folder holds no adapter, or one that was trained on another model.
  """
  parts, checksum = [], peft.base_checksum(base.params)
  for path, weight in adapters:
    folder = find_adapter(path)
    lora, factors = peft.load(folder, base.model)
    if not peft.check_base(folder, checksum):
      logging.warning('%s does not tell its base model; only the shapes were checked.', folder)
    parts.append((lora, factors, weight))
  lora, combined = lora_lib.weighted_sum(parts)
  return dataclasses.replace(base.model, lora=lora), combined


def merge(base, adapters):
  """Returns a TextPolicy with the weights of a base model plus the weighted sum of adapters.

  Arguments and errors as for `combine`.
  """
  model, combined = combine(base, adapters)
  params = lora_lib.merge(base.params, combined, model.lora)
  return policy_lib.TextPolicy(base.model, params, base.tokenizer)


def save(path, base, adapters):
  """Writes merged adapters as a run does: the full model to `model/`, the adapter to `adapter/`.

  Args:
    path: Folder to write.
    base: See `combine`.
    adapters: See `combine`.

  Raises:
    UserError: The folder exists, or see `combine`.
  """
  errors.need(not pathlib.Path(path).exists(), f'{path} exists: name a new folder')
  model, combined = combine(base, adapters)
  peft.save(pathlib.Path(path) / 'adapter', model, combined, base=base.params)
  params = lora_lib.merge(base.params, combined, model.lora)
  merged = policy_lib.TextPolicy(base.model, params, base.tokenizer)
  merged.save(pathlib.Path(path) / 'model')


def choose(
  prompts: Sequence[str],
  examples: Sequence[Sequence[str]],
  *,
  neighbours: int = NEIGHBOURS,
) -> np.ndarray:
  """Chooses the expert of each prompt by its nearest training prompts.

  Texts are TF-IDF vectors of their character n-grams, less what the experts have in common: the
  mean of their mean vectors. The nearest training prompts vote with their cosines; those with a
  negative cosine have no vote.

  Args:
    prompts: Texts.
    examples: Training prompts of each expert; at most EXAMPLES of each are compared, drawn at
      random, the same in every call, so that no expert wins because it has more.
    neighbours: Number of training prompts that vote.

  Returns:
    Numbers of the experts [number of prompts].
  """
  drawn = [
    [texts[i] for i in np.random.default_rng([0, number]).permutation(len(texts))[:EXAMPLES]]
    for number, texts in enumerate(examples)
  ]
  vectorizer = features.TfidfVectorizer(sublinear_tf=True, analyzer='char_wb', ngram_range=(2, 4))
  known = vectorizer.fit_transform([text for texts in drawn for text in texts])
  counts = np.array([*map(len, drawn)])
  mean = np.repeat(1 / (len(drawn) * counts), counts) @ known
  cosines = _cosines_less(mean, vectorizer.transform(prompts), known)
  nearest = np.argsort(-cosines, axis=1, kind='stable')[:, :neighbours]
  expert = np.repeat(np.arange(len(drawn)), counts)
  votes, rows = np.zeros((len(prompts), len(drawn))), np.arange(len(prompts))[:, None]
  np.add.at(votes, (rows, expert[nearest]), np.maximum(cosines[rows, nearest], 0))
  return np.argmax(votes, axis=1)


def _cosines_less(mean, prompts, known):
  """Returns the cosines [P, N] of sparse rows [P, F] and [N, F], less a mean row [F].

  The difference to the mean is not sparse, so it is not computed: (x - m) (y - m) =
  x y - x m - y m + m m.
  """
  products = (prompts @ known.T).toarray() - (prompts @ mean)[:, None] - known @ mean + mean @ mean
  squares = lambda x: np.asarray(x.multiply(x).sum(axis=1)).ravel() - 2 * (x @ mean) + mean @ mean
  norms = lambda x: np.sqrt(np.maximum(squares(x), 1e-12))
  return products / norms(prompts)[:, None] / norms(known)
