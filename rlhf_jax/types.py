"""The pytrees that data, rollout, algorithms and checkpoints exchange.

Letters: B batch, K completions of one prompt, P prompt length, R response length, T = P + R,
V vocabulary, M = ceil(V / 8).

Masks are made together with the tokens and stay with them. No code derives a mask from
`tokens == pad_id`: if the padding token is the EOS, that would drop the EOS.
"""

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, UInt8

# One score for each response, or rewards per token.
ScoreArray = Float[ArrayLike, ' B'] | Float[ArrayLike, 'B R']


@struct.dataclass
class Prompts:
  """Left-padded prompts: all sequences write their first response token at the same index.

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
    response_mask: [B, R] bool, True at sampled tokens, including the EOS.
    logprobs: [B, R] float32, log-probability of each token under the distribution it was
      sampled from (temperature, top-k and top-p applied); 0 outside `response_mask`.
    ended: [B] bool, which responses ended by themselves; None if their tokens show it.
    allowed: [B, R, M] uint8, the tokens that could be sampled at each position, one bit each
      (jnp.packbits), 0 outside `response_mask`; None unless a masking policy restricts the sampler.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']
  logprobs: Float[Array, 'B R']
  ended: Bool[Array, ' B'] | None = None
  allowed: UInt8[Array, 'B R M'] | None = None


@struct.dataclass
class Scores:
  """The scores of a rollout, before the rules of experience.ScoreRules.

  Attributes:
    total: [B] float32, or [B, R] for rewards per token.
    parts: {name: [B] float32}, the terms of the total; empty if it has a single source. `a/b` is a
      term of part `a`.
  """

  total: ScoreArray
  parts: dict[str, Float[Array, ' B']] = struct.field(default_factory=dict)

  @classmethod
  def of(cls, scores: 'Scores | ScoreArray') -> 'Scores':
    """Returns `scores` if they are Scores, else Scores with this array as the total."""
    return scores if isinstance(scores, cls) else cls(scores)


@struct.dataclass
class LMBatch:
  """Rows of tokens for a language-modelling loss, packed or one example in each.

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
  """Prompts and completions, for models whose encoder reads the prompt, and for distillation.

  Attributes:
    tokens: [B, T] int32, left-padded prompt then right-padded completion.
    mask: [B, T] bool, True at real tokens of either.
    response_mask: [B, R] bool, True at the completion's tokens, which are the targets.
  """

  tokens: Int[Array, 'B T']
  mask: Bool[Array, 'B T']
  response_mask: Bool[Array, 'B R']


@struct.dataclass
class Episodes:
  """Prompts, completions and rewards, for offline RL. A row may hold several episodes.

  An action is a token of the assistant; the state before it is all tokens before it. In a decoder
  R = T, and `actions` holds the token after each of `tokens`; the last token of an episode is only
  an action. In an encoder-decoder the last R of the T tokens are the completion, and `actions`
  repeats them.

  Attributes:
    tokens: [B, T] int32.
    segments: [B, T] int32, number of the episode in its row, 0 at padding.
    positions: [B, T] int32, counted within each episode.
    actions: [B, R] int32.
    mask: [B, R] bool, True where `actions` holds an action.
    last: [B, R] bool, True at the last action of each episode.
    rewards: [B, R] float32, the reward of each action; 0 outside the mask.
  """

  tokens: Int[Array, 'B T']
  segments: Int[Array, 'B T']
  positions: Int[Array, 'B T']
  actions: Int[Array, 'B R']
  mask: Bool[Array, 'B R']
  last: Bool[Array, 'B R']
  rewards: Float[Array, 'B R']


@struct.dataclass
class Comparisons:
  """K completions of each prompt, ranked by a human annotator or a simulated one.

  Attributes:
    tokens: [B, K, T] int32, prompt and completion, right-padded.
    mask: [B, K, T] bool, True at real tokens.
    present: [B, K] bool, False at the padding of prompts with fewer than K completions.
    ranks: [B, K] int32, 0 is best, equal ranks are a tie.
    ratings: [B, K] float32, absolute scores; 0 if the data has none.
    margin: [B] float32, margin of the better completion (Llama 2, eq. 2); 0 if there is none.
    annotator: [B] int32, number of the annotator, -1 if the data has none; None if the loss does
      not tell annotators apart.
  """

  tokens: Int[Array, 'B K T']
  mask: Bool[Array, 'B K T']
  present: Bool[Array, 'B K']
  ranks: Int[Array, 'B K']
  ratings: Float[Array, 'B K']
  margin: Float[Array, ' B']
  annotator: Int[Array, ' B'] | None = None


@struct.dataclass
class Preferences:
  """Examples of two sequences each: pairs, or labelled completions with those of other prompts.

  Lane 0 holds the chosen or labelled sequences, lane 1 the others. A row has at most M examples;
  example m is segment m + 1 in both lanes.

  Attributes:
    sequences: LMBatch of arrays [B, 2, T], or Pairs of arrays [B, 2, ...] with M = 1.
    index: [B, M] int32, numbers of the examples in the data; -1 where there is none.
    present: [B, M] bool, False where a row has fewer than M examples.
    desirable: [B, M] bool, labels of the completions in lane 0; False for pairs.
    margin: [B, M] float32, how much better the chosen completion is; 0 if the data do not say.
    ref_logprobs: [B, 2, M] float32, log-probabilities of the completions by the reference; None
      before they are looked up, or without a reference.
  """

  sequences: LMBatch | Pairs
  index: Int[Array, 'B M']
  present: Bool[Array, 'B M']
  desirable: Bool[Array, 'B M']
  margin: Float[Array, 'B M']
  ref_logprobs: Float[Array, 'B 2 M'] | None = None


@struct.dataclass
class Experience:
  """A scored rollout, ready for the update. Positions outside the masks are zero.

  Attributes:
    tokens: [B, T] int32.
    mask: [B, T] bool.
    response_mask: [B, R] bool, positions with a policy loss.
    step_mask: [B, R] bool, positions with a value loss: `response_mask`, and the position that
      gets the score.
    logprobs: [B, R] float32, log-probabilities by the behaviour policy.
    advantages: [B, R] float32.
    ref_logprobs: [B, R] float32, log-probabilities by the reference; None without a reference.
    values: [B, R] float32, values of the critic before the update; None without a critic.
    returns: [B, R] float32; None without a critic.
    frozen_states: [B, T, D] outputs of the frozen lower layers; None if there are none.
    allowed: [B, R, M] uint8, see Rollout; log-probabilities are those of the masked distribution.
    raw_logprobs: [B, R] float32, log-probabilities by the behaviour policy before masking; None
      without masks.
    importance: [B, R] float32, importance weights of the policy loss; None for weights of 1.
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
  allowed: UInt8[Array, 'B R M'] | None = None
  raw_logprobs: Float[Array, 'B R'] | None = None
  importance: Float[Array, 'B R'] | None = None

  @property
  def unmasked_logprobs(self) -> Float[Array, 'B R']:
    """[B, R] float32, log-probabilities from which the KL to the reference is computed."""
    return self.logprobs if self.raw_logprobs is None else self.raw_logprobs


@struct.dataclass
class TrainState:
  """Everything that a run needs to resume exactly, except the position in the data.

  Attributes:
    step: int32 scalar, finished train steps.
    key: random key of the run; each step folds in its number.
    params: trainable parameters, for PPO {'policy': ..., 'critic': ...}.
    opt_state: optax states, a dict with the same names.
    extra: an algorithm's own pytree; for PPO its KL coefficient and the moments of the scores.
      Single arrays are replicated; trees of parameters are sharded like the parameters.
  """

  step: Int[Array, '']
  key: Key[Array, '']
  params: PyTree[Float[Array, '...']]
  opt_state: PyTree[Array]
  extra: PyTree[Array] = struct.field(default_factory=dict)


def positions_from_mask(mask: Bool[ArrayLike, 'B T']) -> Int[Array, 'B T']:
  """Returns the positions of real tokens, from 0: the exclusive cumulative sum of the mask.

  Args:
    mask: [B, T] bool.

  Returns:
    [B, T] int32. Padding gets the position of the next real token, which no code reads.
  """
  mask = mask.astype(jnp.int32)
  return jnp.cumsum(mask, axis=-1) - mask


def step_keys(state: TrainState) -> Key[Array, '2']:
  """Returns the random keys of this step's rollout and of its update."""
  return jax.random.split(jax.random.fold_in(state.key, state.step))
