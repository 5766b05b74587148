"""Metrics of responses by a model that is not trained: BERTScore and perplexity.

They are reward functions, which are evaluators and judges too; see text.py. Each process runs them
on its first device, for its part of the batch. Sequences are padded to a power of two, so few
programs are compiled.

Letters: n pairs, I tokens of a response, J of a reference, D width.

BERTScore (Zhang et al. 2020, https://arxiv.org/abs/1904.09675) matches each token of a response to
the most similar token of the reference, and the reverse, by the cosine of their states in an
encoder:

    P = mean_i max_j cos(x_i, y_j),  R = mean_j max_i cos(x_i, y_j),  F = 2 P R / (P + R)

As in the package bert-score, the first and the last token ([CLS] and [SEP]) can be matched but are
not in the means, and empty texts score 0. It has no weights by inverse document frequency and no
rescaling by a baseline, which are off in bert-score by default. Where bert-score pads a batch, its
maximum includes a 0 for each padding token; ours does not.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float
import numpy as np

from rlhf_jax import errors
from rlhf_jax import forward
from rlhf_jax import sharding
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import text

BATCH_SIZE = 32  # sequences at a time; the last batch is padded to it
MIN_LENGTH = 16  # tokens that shorter sequences are padded to


def _one_device():
  """Returns a context in which computations run on this process's first device.

  Processes have different numbers of batches, so no computation may span processes.
  """
  return jax.set_mesh(sharding.make_mesh({}, devices=jax.local_devices()[:1]))


@functools.lru_cache(maxsize=4)
def _load(path, encoder_layers=None):
  """Returns the model of a folder, its parameters and its tokenizer.

  Args:
    path: Folder.
    encoder_layers: Number of layers of an encoder; 0 for all; None for a language model.
  """
  with _one_device():
    if encoder_layers is None:
      model, params = hf.load(path, unroll=None)
    else:
      model, params = hf.load_encoder(path, layers=encoder_layers or None)
  tokenizer = tokenizers.load(path)
  tokenizers.fit(tokenizer, model)
  return model, params, tokenizer


def _padded_length(rows):
  """Returns a power of two that is at least the length of each of the sequences."""
  return max(MIN_LENGTH, 2 ** math.ceil(math.log2(max(map(len, rows)))))


def _in_batches(function, *columns):
  """Applies a function to lists of BATCH_SIZE items at a time, on this process's first device.

  Args:
    function: (list of BATCH_SIZE items of each column, which repeat the last) -> array of numbers.
    *columns: Lists of n items.

  Returns:
    [n] NumPy array.
  """
  parts, count = [], len(columns[0])
  with _one_device():
    for start in range(0, count, BATCH_SIZE):
      index = [min(i, count - 1) for i in range(start, start + BATCH_SIZE)]
      values = function(*([column[i] for i in index] for column in columns))
      parts.append(np.asarray(values)[: count - start])
  return np.concatenate(parts)


def bert_score(
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  metadata: Sequence[Mapping],
  model: str,
  column: str = text.COLUMN,
  layer: int | None = None,
) -> list[float]:
  """BERTScore F1 of each response with its best reference, by a local BERT or RoBERTa.

  `model` is its folder. `layer` is the layer whose states are compared, the last one by default.
  bert-score takes layer 17 of roberta-large and layer 9 of bert-base-uncased.
  """
  valid = layer is None or isinstance(layer, int) and layer > 0
  errors.need(valid, f'layer={layer!r} must be a positive whole number, or None')
  groups = text.references(prompts, metadata, column)
  if not groups:
    return []
  encoder, params, tokenizer = _load(model, layer or 0)
  encode = lambda texts: _encoder_rows(encoder, tokenizer, texts)
  counts = list(map(len, groups))
  candidates = encode([response for response, n in zip(responses, counts) for _ in range(n)])
  references = encode([one for group in groups for one in group])

  def score(*pair):
    padded = []
    for rows in pair:
      length = min(_padded_length(rows), encoder.max_length)
      padded += learned.right_padded(rows, length, tokenizer.pad_token_id)
    return _bert_score(params, *padded, model=encoder)

  scores = _in_batches(score, candidates, references)
  return [float(part.max()) for part in np.split(scores, np.cumsum(counts)[:-1])]


def _encoder_rows(encoder, tokenizer, texts):
  """Returns the token ids of texts, cut to the model's context, with their special tokens."""
  # As bert-score does: RoBERTa's tokenizer treats a word after a space differently.
  space = ' ' if encoder.family == 'roberta' else ''
  stripped = [space + one.strip() if one.strip() else '' for one in texts]
  return [
    tokenizers.append_eos(tokenizer, row[: encoder.max_length - 1])
    for row in tokenizers.encode(tokenizer, stripped)
  ]


@functools.partial(jax.jit, static_argnames='model')
def _bert_score(params, tokens, mask, other_tokens, other_mask, *, model):
  """Returns the F1 [n] of tokens [n, I] and other tokens [n, J]."""
  states = model.token_states(params, tokens, mask)
  other_states = model.token_states(params, other_tokens, other_mask)
  return greedy_match(states, mask, other_states, other_mask)[2]


def greedy_match(
  states: Float[ArrayLike, 'n I D'],
  mask: Bool[ArrayLike, 'n I'],
  other_states: Float[ArrayLike, 'n J D'],
  other_mask: Bool[ArrayLike, 'n J'],
) -> tuple[Float[Array, ' n'], Float[Array, ' n'], Float[Array, ' n']]:
  """Computes BERTScore's precision, recall and F1; see the top of the file.

  Args:
    states: Of the responses' tokens, of any norm.
    mask: True at their tokens, right-padded. The first and the last are special tokens.
    other_states: Of the references' tokens.
    other_mask: True at their tokens, likewise.
  """
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  cosines = jnp.einsum('nid,njd->nij', unit(states), unit(other_states))
  cosines = jnp.where(mask[:, :, None] & other_mask[:, None, :], cosines, -jnp.inf)

  def mean(best, mask):
    count = jnp.sum(mask, axis=1)[:, None] - 2
    place = jnp.arange(mask.shape[1])[None]
    inner = (place > 0) & (place <= count)
    return jnp.sum(jnp.where(inner, best, 0.0), axis=1) / jnp.maximum(count[:, 0], 1)

  precision, recall = mean(cosines.max(axis=2), mask), mean(cosines.max(axis=1), other_mask)
  empty = (jnp.sum(mask, axis=1) <= 2) | (jnp.sum(other_mask, axis=1) <= 2)
  precision, recall = jnp.where(empty, 0.0, precision), jnp.where(empty, 0.0, recall)
  total = precision + recall
  return precision, recall, 2 * precision * recall / jnp.where(total == 0, 1.0, total)


def perplexity(prompts: Sequence[str], responses: Sequence[str], *, model: str) -> list[float]:
  """The perplexity of each response given its prompt, and of the EOS after it; lower is better.

      exp(-1 / n sum_t log p(y_t | x, y_<t)),  n tokens with the EOS

  `model` is the folder of a language model, whose own tokenizer encodes the texts. As a reward,
  `log_perplexity` is better behaved: its values are not as far apart.
  """
  return np.exp(log_perplexity(prompts, responses, model=model)).tolist()


def corpus_perplexity(
  prompts: Sequence[str], responses: Sequence[str], *, model: str
) -> list[float]:
  """The perplexity of all tokens of the batch, for each response; see `perplexity`."""
  if not prompts:
    return []
  logprobs, counts = _logprobs(prompts, responses, model)
  return [math.exp(-logprobs.sum() / counts.sum())] * len(responses)


def log_perplexity(prompts: Sequence[str], responses: Sequence[str], *, model: str) -> list[float]:
  """The logarithm of the perplexity of each response, in nats per token; lower is better."""
  if not prompts:
    return []
  logprobs, counts = _logprobs(prompts, responses, model)
  return (-logprobs / counts).tolist()


def _logprobs(prompts, responses, path):
  """Returns the log-probabilities [n] of responses with their EOS, and their numbers of tokens."""
  model, params, tokenizer = _load(path)
  eos = tokenizer.eos_token_id
  # GPT-2 starts texts with its EOS and has no other token for it.
  starts = [row if len(row) else [eos] for row in tokenizers.encode(tokenizer, prompts)]
  ends = [
    tokenizers.append_eos(tokenizer, row)
    for row in tokenizers.encode_continuation(tokenizer, responses)
  ]
  longest = max(range(len(ends)), key=lambda i: len(starts[i]) + len(ends[i]))
  length = len(starts[longest]) + len(ends[longest])
  errors.need(
    length <= model.max_length or model.encoder_decoder,
    f'model={path!r} reads {model.max_length} tokens, but prompt and response number {longest} '
    f'have {length} in its tokenizer: shorten the prompts, or lower sampling.max_new_tokens',
  )

  def score(starts, ends):
    rollout = learned.rollout_of(
      starts, ends, (_padded_length(starts), _padded_length(ends)), tokenizer.pad_token_id
    )
    return forward.response_logprobs(params, rollout, 1.0, model=model)

  return _in_batches(score, starts, ends), np.array(list(map(len, ends)))


corpus_perplexity.whole_batch = True  # workers score one example at a time; see host.py
