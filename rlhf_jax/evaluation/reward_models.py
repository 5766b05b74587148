"""A reward model outside of training: scores of samples, and its calibration on held-out pairs.

Letters: n samples or pairs, T sequence length.
"""

import dataclasses
import functools

import jax
import numpy as np

from rlhf_jax import folders
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import calibration
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import scoring
from rlhf_jax.rollout import actor


@dataclasses.dataclass
class RewardModel:
  """A reward model with its tokenizer: texts in, scores out.

  It can be called like a reward function, with prompts and responses; see rewards/functions.py.

  Attributes:
    policy: its model, parameters and tokenizer.
  """

  policy: policy_lib.TextPolicy

  @property
  def path(self):
    """Its Hugging Face folder, a pathlib.Path."""
    return self.policy.path

  @classmethod
  def load(cls, path):
    """From a Hugging Face folder of a sequence classifier with one label."""
    model, params = hf.load_reward(path, unroll=None)
    return cls(policy_lib.TextPolicy(model, params, tokenizers.load(path), folders.model(path)))

  def __call__(self, prompts, responses, *, response_tokens=None, metadata=None):
    """As `score`; the other arguments of a reward function are not used."""
    del response_tokens, metadata
    return self.score(prompts, responses)

  def score(self, prompts, responses):
    """Scores [n] of responses, which end with an EOS, as in training by default.

    Args:
      prompts: n texts.
      responses: n texts.
    """
    own = self.policy
    return self.score_tokens(
      *learned.padded_texts(
        own.model,
        own.tokenizer,
        prompts,
        responses,
        [True] * len(responses),
        max_length=own.model.max_length,
      )
    )

  def score_samples(self, samples, tokenizer):
    """Scores [n] of Samples: of their tokens if the reward model has the same tokenizer, else of
    their texts.

    Args:
      samples: Samples of a policy.
      tokenizer: the policy's.
    """
    rollout, own = samples.rollout, self.policy
    if learned.same_tokenizer(own.tokenizer, tokenizer):
      return self.score_tokens(rollout.tokens, rollout.mask)
    ended = learned.with_eos(actor.texts_of(rollout, tokenizer)[1], tokenizer)
    return self.score_tokens(
      *learned.padded_texts(
        own.model,
        own.tokenizer,
        samples.prompts,
        samples.responses,
        ended,
        max_length=own.model.max_length,
      )
    )

  def score_tokens(self, tokens, mask):
    """Scores [n] of tokens [n, T] and their mask."""
    return policy_lib.in_batches(
      lambda batch, start: _score(self.policy.params, *batch, model=self.policy.model),
      (tokens, mask),
    )


@functools.partial(jax.jit, static_argnames=('model',))
def _score(params, tokens, mask, *, model):
  return scoring.score(params, tokens, mask, model=model)


def pair_gaps(scorer, path, *, max_length=0, append_eos=True):
  """Gaps r_better - r_worse [n] of a data set of comparisons, and their n prompts.

  Args:
    scorer: RewardModel.
    path: data set.
    max_length: tokens of a sequence; 0 for the model's context.
    append_eos: see pipelines.comparison_batches.
  """
  tokenizer = scorer.policy.tokenizer
  examples, _ = formats.comparisons(sources.read(path), tokenizer=tokenizer)
  batches = pipelines.comparison_batches(
    examples,
    tokenizer,
    batch_size=min(policy_lib.BATCH, len(examples)),
    max_length=max_length or scorer.policy.model.max_length,
    append_eos=append_eos,
  )
  gaps, prompts, first = [], [], 0
  for batch, _ in batches:
    tokens, mask = (x.reshape((-1,) + x.shape[2:]) for x in (batch.tokens, batch.mask))
    scores = scorer.score_tokens(tokens, mask).reshape(batch.ranks.shape)
    values, index = scoring.pair_gaps(scores, batch)
    gaps.append(values)
    prompts += [examples[first + i].prompt for i in index]
    first += len(scores)
  return np.concatenate(gaps), prompts


def calibrate(scorer, path, *, append_eos=True):
  """Calibration of a reward model on held-out pairs, as a dict; see `pair_gaps`."""
  gaps, prompts = pair_gaps(scorer, path, append_eos=append_eos)
  return dataclasses.asdict(calibration.pairwise(gaps, np.zeros_like(gaps), prompts=prompts))
