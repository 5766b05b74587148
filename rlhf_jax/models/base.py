"""What decoders, encoder-decoders and encoders share: the static half of a model."""

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

# Parameters that every family reads in the compute dtype and in no other.
_MATRICES = 'kernel', 'embed/embedding', 'positions/embedding', 'lora/a', 'lora/b'


@dataclasses.dataclass(frozen=True)
class Base:
  """A model without its parameters; hashable, so static under jit.

  Attributes:
    family: a name in FAMILIES.
    config: the family's Config.
    dtype: of the computation, 'float32' or 'bfloat16'; softmax and norms are float32 always.
    remat: 'none', 'block' (recompute each block in the backward pass) or 'dots' (keep the
      outputs of its matmuls).
    unroll: layers unrolled in a scan; None: see stack.default_unroll.
    lora: adapters its parameters hold, or None.
    after_blocks: names of the parameters that follow the blocks, trained with the top ones.
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
  def reads_tokens(self):
    """Whether heads read the states of single tokens, so that a critic can start from it."""
    return False

  @property
  def width(self):
    """D."""
    return self.config.width

  @property
  def vocab_size(self):
    """V."""
    return self.config.vocab_size

  @property
  def max_length(self):
    """Tokens of a row that the model was made for; some families have no positions for more."""
    return self.config.max_length

  @property
  def rules(self):
    """Sharding of the parameters and heads: tuple of (regex on the '/'-joined path, PartitionSpec)."""
    return lora_lib.rules(self._module.RULES) + self._module.RULES + heads.RULES

  @property
  def _module(self):
    return FAMILIES[self.family]

  @functools.partial(jax.jit, static_argnums=0)
  def init(self, key):
    """Draws parameters, without adapters.

    Args:
      key: random key.

    Returns:
      Pure dict of float32 arrays; under 'blocks' stacked on a leading axis of layers.
    """
    return stack.init_params(key, self.shapes(), self.config.std)

  def shapes(self):
    """The tree of parameters, without adapters, as float32 ShapeDtypeStructs."""
    raise NotImplementedError

  def summary(self, params, tokens, mask):
    """The state [B, D] that a scalar head reads a text's score from.

    Args:
      params: from `init`, `hf.load` or `hf.load_reward`.
      tokens: [B, T] int32, padded on either side; those outside the mask are not read.
      mask: [B, T] bool.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LanguageModel(Base):
  """A model that generates text: a decoder, or an encoder-decoder."""

  @property
  def reads_tokens(self):
    return True

  def unembed(self, params, hidden):
    """Logits of the next token.

    Args:
      params: from `init` or `hf.load`.
      hidden: [..., D], states from any of the methods below.

    Returns:
      [..., V] float32.
    """
    raise NotImplementedError

  def response_states(self, params, tokens, mask, response_length, frozen_states=None):
    """Hidden states that predict the response tokens of finished rollouts.

    Args:
      params: from `init` or `hf.load`.
      tokens: [B, P + R] int32, left-padded prompt then right-padded response.
      mask: [B, P + R] bool.
      response_length: R.
      frozen_states: None, or what a decoder's `run_frozen_layers` returned for the same tokens.

    Returns:
      [B, R, D]; slot t predicts response token t.
    """
    raise NotImplementedError

  def prefill(self, params, tokens, mask, response_length):
    """Reads prompts into a new cache.

    Args:
      params: from `init`, `hf.load` or `unstack`.
      tokens: [B, P] int32, left-padded.
      mask: [B, P] bool.
      response_length: R, the response length to make room for.

    Returns:
      The state [B, D] that predicts the first response token, and the cache for `step`.
    """
    raise NotImplementedError

  def step(self, params, token, alive, cache):
    """Reads one more token of each row.

    Args:
      params: as for `prefill`.
      token: [B] int32.
      alive: [B] bool; the tokens of other rows are not read.
      cache: from `prefill` or `step`.

    Returns:
      The state [B, D] that predicts the token after it, and the cache.
    """
    raise NotImplementedError

  def with_max_length(self, length):
    """The model for rows that will have `length` tokens, of which a call or its cache may hold fewer."""
    del length
    return self

  def unstack(self, params):
    """Parameters as a loop of many small steps reads them best: on GPUs matrices in the compute dtype.

    Else every step would read them in their own dtype, write them in this one, and read that.
    """
    if sharding.platform() != 'gpu':
      return params

    def cast(name, x):
      smaller = jnp.dtype(self.dtype).itemsize < x.dtype.itemsize
      return x.astype(self.dtype) if smaller and name.endswith(_MATRICES) else x

    return sharding.map_with_path(cast, params)

  def _with_unembed(self, tree):
    """Adds the unembedding's shape to a tree of parameters where it is not the embedding."""
    if self.config.tie_word_embeddings:
      return tree
    kernel = jax.ShapeDtypeStruct((self.width, self.vocab_size), jnp.float32)
    return tree | {'unembed': {'kernel': kernel}}

  def _logits(self, params, hidden):
    """States [..., D] times the unembedding, tied or not, and its adapter: [..., V] float32."""
    if self.config.tie_word_embeddings:
      logits = layers.unembed(hidden, params['embed']['embedding'])
    else:
      kernel = params['unembed']['kernel'].astype(hidden.dtype)
      logits = layers.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if self.lora is not None and 'lora' in params.get('unembed', {}):
      logits += self.lora.apply('unembed', params['unembed']['lora'], hidden)
    return logits
