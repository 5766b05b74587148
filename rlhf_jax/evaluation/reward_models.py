"""A reward model after training: scores of texts, and calibration on held-out pairs.

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
from rlhf_jax.models import heads
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
    policy: TextPolicy that holds the model, its parameters and its tokenizer.
  """

  policy: policy_lib.TextPolicy

  @property
  def path(self):
    """Hugging Face folder of the model, a pathlib.Path."""
    return self.policy.path

  @classmethod
  def load(cls, path):
    """Loads a reward model from a Hugging Face folder; see hf.load_reward."""
    model, params = hf.load_reward(path, unroll=None)
    return cls(
      policy_lib.TextPolicy(model, params, tokenizers.load(path), folders.find_model(path))
    )

  def __call__(self, prompts, responses, *, response_tokens=None, metadata=None):
    """Calls `score`; the other arguments of a reward function are not used."""
    del response_tokens, metadata
    return self.score(prompts, responses)

  def score(self, prompts, responses):
    """Computes scores [n] of responses. Adds an EOS to each, as training does by default.

    Args:
      prompts: n texts.
      responses: n texts.
    """
    model = self.policy.model
    return self.score_tokens(
      *learned.padded_texts(
        model,
        self.policy.tokenizer,
        prompts,
        responses,
        [True] * len(responses),
        max_length=model.max_length,
      )
    )

  def score_samples(self, samples, tokenizer):
    """Computes scores [n] of Samples.

    Scores their tokens if the reward model has the same tokenizer, else their texts.

    Args:
      samples: Samples of a policy.
      tokenizer: Tokenizer of the policy.
    """
    rollout, model = samples.rollout, self.policy.model
    if learned.same_tokenizer(self.policy.tokenizer, tokenizer):
      return self.score_tokens(rollout.tokens, rollout.mask)
    ended = learned.with_eos(actor.texts_of(rollout, tokenizer)[1], tokenizer)
    return self.score_tokens(
      *learned.padded_texts(
        model,
        self.policy.tokenizer,
        samples.prompts,
        samples.responses,
        ended,
        max_length=model.max_length,
      )
    )

  def score_tokens(self, tokens, mask):
    """Computes scores [n] of tokens [n, T] with a mask [n, T], the mean over heads."""
    return policy_lib.in_batches(
      lambda batch, start: _score(self.policy.params, *batch, model=self.policy.model),
      (tokens, mask),
    )


@functools.partial(jax.jit, static_argnames=('model',))
def _score(params, tokens, mask, *, model):
  params = params | {'head': heads.mean(params['head'])}
  return scoring.score(params, tokens, mask, model=model)


def pair_gaps(scorer, path, *, max_length=0, append_eos=True):
  """Computes the gaps r_better - r_worse of a data set of comparisons.

  Args:
    scorer: RewardModel.
    path: Path of the data set.
    max_length: Maximum number of tokens of a sequence; 0 for the model's context.
    append_eos: See pipelines.comparison_batches.

  Returns:
    Gaps [n], and the list of their n prompts.
  """
  tokenizer = scorer.policy.tokenizer
  examples, _ = formats.comparisons(sources.read(path), tokenizer=tokenizer)
  batches = pipelines.comparison_batches(
    examples,
    tokenizer,
    batch_size=min(policy_lib.BATCH_SIZE, len(examples)),
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
  """Returns the calibration of a reward model on held-out pairs as a dict; see `pair_gaps`."""
  gaps, prompts = pair_gaps(scorer, path, append_eos=append_eos)
  return dataclasses.asdict(calibration.pairwise(gaps, np.zeros_like(gaps), prompts=prompts))
