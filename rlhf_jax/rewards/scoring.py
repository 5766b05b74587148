"""Scores of tokens by a reward model, read at the last token that is not padding.

A model with several heads gives several scores of each sequence, on a last axis `heads`.

Letters: B prompts, K completions of one prompt, T sequence length.
"""

from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree
import numpy as np

from rlhf_jax import types
from rlhf_jax.models import base
from rlhf_jax.models import heads


def score(
  params: dict[str, PyTree],
  tokens: Int[ArrayLike, 'n T'],
  mask: Bool[ArrayLike, 'n T'],
  *,
  model: base.Base,
) -> Float[Array, ' n *heads']:
  """Computes the score of each sequence, read at its last token that is not padding.

  Args:
    params: {'backbone', 'head'}.
    tokens: [n, T] int32, padded on either side.
    mask: [n, T] bool, False at padding.
    model: Model.

  Returns:
    [n] float32; [n, heads] if there are several heads.
  """
  return heads.apply_scalar(params['head'], model.summary(params['backbone'], tokens, mask))


def comparison_scores(
  params: dict[str, PyTree], batch: types.Comparisons, *, model: base.Base
) -> Float[Array, 'B K *heads']:
  """Computes the scores of all completions of Comparisons."""
  tokens, mask = (x.reshape((-1,) + x.shape[2:]) for x in (batch.tokens, batch.mask))
  scores = score(params, tokens, mask, model=model)
  return scores.reshape(batch.present.shape + scores.shape[1:])


def pair_gaps(
  scores: Float[ArrayLike, 'B K'], batch: types.Comparisons
) -> tuple[Float[ArrayLike, ' n'], Int[np.ndarray, ' n']]:
  """Returns gaps r_better - r_worse [n] of all pairs of a batch, and the batch index of each."""
  ranks, present = np.asarray(batch.ranks), np.asarray(batch.present)
  better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
  return (scores[:, :, None] - scores[:, None, :])[better], np.nonzero(better)[0]
