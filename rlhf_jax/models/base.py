"""Base classes of decoders, encoder-decoders and encoders: the static half of a model.

Letters: B batch, T tokens, P prompt length, R response length, V vocabulary, D width.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.models import heads
from rlhf_jax.models import hf_config
from rlhf_jax.models import layers
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import stack
from rlhf_jax.models.families import FAMILIES

# Parameters that every family uses in the compute dtype only.
_MATRICES = 'kernel', 'embed/embedding', 'positions/embedding', 'lora/a', 'lora/b'


@dataclasses.dataclass(frozen=True)
class Base(abc.ABC):
  """A model without its parameters; hashable, so it can be a static argument of jit.

  Attributes:
    family: Name in FAMILIES.
    config: The family's Config.
    dtype: Compute dtype, 'float32' or 'bfloat16'; softmax and norms are always float32.
    remat: What the backward pass recomputes: 'none', 'block' (each block) or 'dots' (each block
      except its matmuls).
    unroll: Layers unrolled in a scan, or None for stack.default_unroll.
    lora: The adapters that its parameters include, or None.
    encoder_decoder: Whether an encoder reads the prompt and a decoder writes the response.
    after_blocks: Names of the parameters after the blocks; they are trained with the top blocks.
  """

  family: str
  config: hf_config.Config
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int | None = 1
  lora: lora_lib.Lora | None = None
  encoder_decoder = False
  after_blocks = frozenset({'norm', 'project_out', 'unembed'})

  @property
  def has_token_states(self):
    """Whether a head can read one state per token, as a critic's does."""
    return False

  @property
  def width(self):
    """Width of the hidden states, D."""
    return self.config.width

  @property
  def vocab_size(self):
    """Size of the vocabulary, V."""
    return self.config.vocab_size

  @property
  def max_length(self):
    """Sequence length that the model was made for; some families have no positions beyond it."""
    return self.config.max_length

  @property
  def rules(self):
    """Sharding rules of parameters and heads: (regex on the path, PartitionSpec) pairs."""
    return lora_lib.rules(self._module.RULES) + self._module.RULES + heads.RULES

  @property
  def _module(self):
    return FAMILIES[self.family]

  @functools.partial(jax.jit, static_argnums=0)
  def init(self, key):
    """Initializes parameters, without adapters.

    Args:
      key: Random key.

    Returns:
      Nested dict of float32 arrays; those under 'blocks' have a leading axis of layers.
    """
    return stack.init_params(key, self.shapes(), self.config.std)

  @abc.abstractmethod
  def shapes(self):
    """Returns the tree of parameters, without adapters, as float32 ShapeDtypeStructs."""

  @abc.abstractmethod
  def summary(self, params, tokens, mask):
    """Computes the state from which a scalar head reads the score of a sequence.

    Args:
      params: Parameters from `init`, `hf.load` or `hf.load_reward`.
      tokens: [B, T] int32, padded on either side; those outside the mask are not read.
      mask: [B, T] bool.

    Returns:
      [B, D].
    """


@dataclasses.dataclass(frozen=True)
class LanguageModel(Base):
  """A model that generates text: a decoder, or an encoder-decoder."""

  @property
  def has_token_states(self):
    return True

  @abc.abstractmethod
  def unembed(self, params, hidden):
    """Computes logits of the next token.

    Args:
      params: Parameters from `init` or `hf.load`.
      hidden: [..., D], states from any of the methods below.

    Returns:
      [..., V] float32.
    """

  @abc.abstractmethod
  def response_states(self, params, tokens, mask, response_length, frozen_states=None):
    """Computes the hidden states that predict the response tokens of finished rollouts.

    Args:
      params: Parameters from `init` or `hf.load`.
      tokens: [B, P + R] int32, left-padded prompt then right-padded response.
      mask: [B, P + R] bool.
      response_length: R.
      frozen_states: Result of a decoder's `run_frozen_layers` for the same tokens, or None.

    Returns:
      [B, R, D]; state t predicts response token t.
    """

  @abc.abstractmethod
  def prefill(self, params, tokens, mask, response_length):
    """Reads prompts into a new cache.

    Args:
      params: Parameters from `init`, `hf.load` or `unstack`.
      tokens: [B, P] int32, left-padded.
      mask: [B, P] bool.
      response_length: R, number of response tokens for which the cache has slots.

    Returns:
      The state [B, D] that predicts the first response token, and the cache for `step`.
    """

  @abc.abstractmethod
  def step(self, params, token, active, cache):
    """Reads one more token of each sequence.

    Args:
      params: See `prefill`.
      token: [B] int32.
      active: [B] bool, False for finished sequences, whose tokens are not read.
      cache: Cache from `prefill` or `step`.

    Returns:
      The state [B, D] that predicts the next token, and the updated cache.
    """

  def with_max_length(self, length):
    """Returns the model for sequences that grow to `length` tokens, even if a call has fewer."""
    del length
    return self

  def with_plain_attention(self):
    """Returns the model whose attention supports forward-mode differentiation."""
    return self

  def unstack(self, params):
    """Returns the parameters in the layout that is fastest for a decode loop.

    On GPUs, matrices are cast to the compute dtype once; otherwise every step would read them in
    their own dtype, write them in the compute dtype and read them again.
    """
    if sharding.platform() != 'gpu':
      return params

    def cast(name, x):
      smaller = jnp.dtype(self.dtype).itemsize < x.dtype.itemsize
      return x.astype(self.dtype) if smaller and name.endswith(_MATRICES) else x

    return sharding.map_with_path(cast, params)

  def _with_unembed(self, tree):
    """Adds the unembedding's shape to a tree of parameters, unless it is tied to the embedding."""
    if self.config.tie_word_embeddings:
      return tree
    kernel = jax.ShapeDtypeStruct((self.width, self.vocab_size), jnp.float32)
    return tree | {'unembed': {'kernel': kernel}}

  def _logits(self, params, hidden):
    """Multiplies states [..., D] by the unembedding, with its adapter if any: [..., V] float32."""
    if self.config.tie_word_embeddings:
      logits = layers.unembed(hidden, params['embed']['embedding'])
    else:
      kernel = params['unembed']['kernel'].astype(hidden.dtype)
      logits = layers.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if self.lora is not None and 'lora' in params.get('unembed', {}):
      logits += self.lora.apply('unembed', params['unembed']['lora'], hidden)
    return logits
