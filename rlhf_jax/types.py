"""The few pytrees that travel between data, rollout, algorithms and checkpoints.

Letters: B batch, K completions of one prompt, P prompt length, R response length, T = P + R.

Masks are made where tokens are made and travel with them. No code derives a mask from
`tokens == pad_id` later: where the padding token is the EOS, that would eat the EOS.
"""

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

# One score for each response, or rewards per token.
ScoreArray = Float[ArrayLike, ' B'] | Float[ArrayLike, 'B R']


@struct.dataclass
class Prompts:
  """Left-padded prompts, so that every row writes its first response token at the same index.

  Attributes:
    tokens: [B, P] int32.
    mask: [B, P] bool, True at real tokens.
  """

  tokens: Int[Array, 'B P']
  mask: Bool[Array, 'B P']


@struct.dataclass
class Rollout:
  """Prompts and the responses sampled for them.

  Attributes:
    tokens: [B, T] int32, left-padded prompt then right-padded response.
    mask: [B, T] bool, True at real tokens of either.
    response_mask: [B, R] bool, True at sampled tokens, the EOS included.
    logprobs: [B, R] float32, log-probability of each token under the distribution it was
      sampled from (temperature, top-k and top-p applied); 0 outside `response_mask`.
    ended: [B] bool, which responses ended by themselves; None where their tokens tell.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']
  logprobs: Float[Array, 'B R']
  ended: Bool[Array, ' B'] | None = None


@struct.dataclass
class Scores:
  """What a scorer gives a rollout, before the rules of experience.ScoreRules.

  Attributes:
    total: [B] float32, or [B, R] for rewards per token.
    parts: {name: [B] float32}, what the total was made of; empty where it has one source. `a/b` is
      what part `a` was made of.
  """

  total: ScoreArray
  parts: dict[str, Float[Array, ' B']] = struct.field(default_factory=dict)

  @classmethod
  def of(cls, scores: 'Scores | ScoreArray') -> 'Scores':
    """Scores of an array of totals; those that are Scores already stay as they are."""
    return scores if isinstance(scores, cls) else cls(scores)


@struct.dataclass
class LMBatch:
  """Rows for a language-modelling loss, packed or one example a row.

  Attributes:
    tokens: [B, T] int32.
    segments: [B, T] int32, 0 at padding; tokens attend within equal segments only.
    positions: [B, T] int32, counted within each segment.
    loss_mask: [B, T] bool, True where token t is a target (predicted from token t - 1).
  """

  tokens: Int[Array, 'B T']
  segments: Int[Array, 'B T']
  positions: Int[Array, 'B T']
  loss_mask: Bool[Array, 'B T']


@struct.dataclass
class Pairs:
  """Prompts and completions apart, for models whose encoder reads the prompt.

  Attributes:
    tokens: [B, T] int32, left-padded prompt then right-padded completion.
    mask: [B, T] bool, True at real tokens of either.
    response_mask: [B, R] bool, True at the completion's tokens, which are the targets.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']


@struct.dataclass
class Comparisons:
  """K completions of each prompt, ordered by a human (or a simulated one).

  Attributes:
    tokens: [B, K, T] int32, prompt and completion, right-padded.
    mask: [B, K, T] bool, True at real tokens.
    present: [B, K] bool, False where a prompt has fewer than K completions.
    ranks: [B, K] int32, 0 is best, equal ranks are a tie.
    ratings: [B, K] float32, absolute scores where the data has them, else 0.
    margin: [B] float32, by how much the better one should win (Llama 2, eq. 2), else 0.
  """

  tokens: Int[Array, 'B K T']
  mask: Bool[Array, 'B K T']
  present: Bool[Array, 'B K']
  ranks: Int[Array, 'B K']
  ratings: Float[Array, 'B K']
  margin: Float[Array, ' B']


@struct.dataclass
class Experience:
  """A scored rollout, ready for the update. Positions outside the masks hold zeros.

  Attributes:
    tokens: [B, T] int32.
    mask: [B, T] bool.
    response_mask: [B, R] bool, positions with a policy loss.
    step_mask: [B, R] bool, positions with a value loss: those and the one the score is paid on.
    logprobs: [B, R] float32 of the behaviour policy.
    advantages: [B, R] float32.
    ref_logprobs: [B, R] float32 of the reference; None without one.
    values: [B, R] float32 of the critic before the update; None without one.
    returns: [B, R] float32; None without a critic.
    frozen_states: [B, T, D] states below the trained layers; None if the lowest is trained too.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']
  step_mask: Bool[Array, 'B R']
  logprobs: Float[Array, 'B R']
  advantages: Float[Array, 'B R'] | None = None
  ref_logprobs: Float[Array, 'B R'] | None = None
  values: Float[Array, 'B R'] | None = None
  returns: Float[Array, 'B R'] | None = None
  frozen_states: Float[Array, 'B T D'] | None = None


@struct.dataclass
class TrainState:
  """Everything a training run needs to resume exactly, but for the data.

  Attributes:
    step: int32 scalar, finished train steps.
    key: random key; folded with `step`, never reused.
    params: trainable parameters, for PPO {'policy': ..., 'critic': ...}.
    opt_state: optax state of the same shape of dict.
    extra: an algorithm's own pytree, for PPO its KL coefficient and the moments of the scores. Single
      arrays are replicated, trees of parameters lie where the parameters lie.
  """

  step: Int[Array, '']
  key: Key[Array, '']
  params: PyTree[Float[Array, '...']]
  opt_state: PyTree[Array]
  extra: PyTree[Array] = struct.field(default_factory=dict)


def positions_from_mask(mask: Bool[ArrayLike, 'B T']) -> Int[Array, 'B T']:
  """Positions of real tokens, counted from 0: the exclusive cumulative sum of the mask.

  Args:
    mask: [B, T] bool.

  Returns:
    [B, T] int32. Padding gets the position of the next real token, which nobody reads.
  """
  mask = mask.astype(jnp.int32)
  return jnp.cumsum(mask, axis=-1) - mask


def step_keys(state: TrainState) -> Key[Array, '2']:
  """The random keys of this step's rollout and of its update, never used again."""
  return jax.random.split(jax.random.fold_in(state.key, state.step))
