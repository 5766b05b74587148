"""A language model as functions of its parameters: stacked blocks under one scan, one static cache.

Letters: B batch, T tokens of this call, S cache length, L layers, V vocabulary, D width, K
key/value heads, H head width.

Parameters are a plain dict of float32 arrays; those under 'blocks' have a leading axis of
layers. The Flax modules are split once into a graph (static) and this dict, and merged again
inside the functions, one slice per layer inside the scan.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import gpt2
from rlhf_jax.models import heads
from rlhf_jax.models import layers
from rlhf_jax.models import llama

FAMILIES = {'gpt2': gpt2, 'llama': llama}
DTYPES = ('float32', 'bfloat16')
# What a block keeps for its backward pass: everything, its input, or also its matmuls' outputs.
REMAT = {
    'none': None,
    'block': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model without its parameters; hashable, so static under jit.

  Attributes:
    family: 'gpt2' or 'llama'.
    config: the family's Config.
    dtype: of the computation, 'float32' or 'bfloat16'; softmax and norms are float32 always.
    remat: 'none', 'block' (recompute each block in the backward pass) or 'dots' (keep the
      outputs of its matmuls).
    unroll: layers unrolled in the scan; more is faster and compiles longer.
  """
  family: str
  config: Any
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1

  @classmethod
  def create(cls, fields, *, dtype='float32', remat='none', unroll=1):
    """Builds a model from field names of Hugging Face's config.json.

    Args:
      fields: mapping with 'family' (or 'model_type') and the family's fields.
      dtype, remat, unroll: see the class.

    Raises:
      UserError: an unknown family, or a field that is missing, unknown or not supported.
    """
    fields = dict(fields)
    family = fields.get('family', fields.get('model_type'))
    for name, value, options in (('family', family, FAMILIES), ('dtype', dtype, DTYPES), ('remat', remat, REMAT)):
      if value not in options:
        raise UserError(f'model: {name}={value!r} is not supported; choose from {sorted(options)}')
    if unroll < 1:
      raise UserError(f'model: unroll={unroll} must be at least 1')
    return cls(family, FAMILIES[family].Config.from_hf(fields), dtype, remat, unroll)

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
    """Positions the model was made for; GPT-2 has no more of them."""
    return self.config.max_length

  @property
  def rules(self):
    """Sharding of the parameters and heads: tuple of (regex on the '/'-joined path, PartitionSpec)."""
    return self._module.RULES + heads.RULES

  @property
  def _module(self):
    return FAMILIES[self.family]

  def init(self, key):
    """Draws parameters.

    Args:
      key: random key.

    Returns:
      Pure dict of float32 arrays; under 'blocks' stacked on a leading L axis.
    """
    return jax.jit(self._init)(key)

  def _init(self, key):
    shapes = self._shapes()
    drawn = {name: math.prod(leaf.shape) for name, leaf in sharding.paths(shapes).items()
             if not name.endswith(('scale', 'bias'))}
    # One draw, cut into pieces: each of its own would take half a second to compile.
    normal = jax.random.normal(key, (sum(drawn.values()),))
    starts = dict(zip(drawn, itertools.accumulate(drawn.values(), initial=0)))

    def fill(name, leaf):
      if name not in drawn:
        return jnp.ones(leaf.shape) if name.endswith('scale') else jnp.zeros(leaf.shape)
      piece = normal[starts[name]:starts[name] + drawn[name]]
      return piece.reshape(leaf.shape) * self.config.std(name)

    return sharding.map_with_path(fill, shapes)

  def _shapes(self):
    """The tree of parameters as ShapeDtypeStructs."""
    config = self.config

    def abstract(cls):
      module = nnx.eval_shape(lambda: cls(config, dtype=self.dtype, rngs=nnx.Rngs(0)))
      return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def struct(*shape):
      return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = jax.tree.map(lambda leaf: struct(*leaf.shape), abstract(self._module.Ends))
    shapes['blocks'] = jax.tree.map(lambda leaf: struct(config.depth, *leaf.shape), abstract(self._module.Block))
    if not config.tie_word_embeddings:
      shapes['unembed'] = {'kernel': struct(config.width, config.vocab_size)}
    return shapes

  def init_cache(self, batch, length):
    """An empty cache for `length` tokens a row.

    Returns:
      Dict with 'k' and 'v' [L, B, K, S, H], 'segments' [B, S] int32 (0: nothing there) and
      'index', the int32 slot that the next call writes first.
    """
    shape = (self.config.depth, batch, self.config.kv_heads, length, self.config.head_width)
    empty = sharding.split_rows(jnp.zeros(shape, self.dtype), axis=1)
    segments = sharding.split_rows(jnp.zeros((batch, length), jnp.int32))
    return {'k': empty, 'v': empty, 'segments': segments, 'index': jnp.zeros((), jnp.int32)}

  def forward(self, params, tokens, positions, segments, cache=None):
    """Runs the backbone.

    A token attends to itself and earlier tokens of its row with the same non-zero segment;
    with a cache, also to those written before. Tokens and positions at segment 0 are not read.

    Args:
      params: from `init` or `hf.load`.
      tokens, positions: [B, T] int32.
      segments: [B, T] int32 (or bool mask), 0 at padding.
      cache: None, or a cache with room for T more tokens; the caller counts, beyond the end
        the last slots are overwritten.

    Returns:
      Hidden states [B, T, D] after the final norm, in the compute dtype; and None, or the cache
      with these tokens written and its index advanced by T.
    """
    segments = segments.astype(jnp.int32)
    real = segments != 0
    if cache is None:
      memory, written = (), None
      mask = layers.attention_mask(segments, segments, index=0)
    else:
      key_segments = jax.lax.dynamic_update_slice(cache['segments'], segments, (0, cache['index']))
      memory = (cache['k'], cache['v'], cache['index'])
      mask = layers.attention_mask(segments, key_segments, index=cache['index'])
    ends = nnx.merge(_graph(self._module.Ends, self.config, self.dtype), _without(params, 'blocks', 'unembed'))
    x, shared = ends.begin(jnp.where(real, tokens, 0), jnp.where(real, positions, 0))
    x, memory = self._blocks(params['blocks'], sharding.split_rows(x), shared, mask, memory)
    if cache is not None:
      written = {'k': memory[0], 'v': memory[1], 'segments': key_segments, 'index': cache['index'] + tokens.shape[1]}
    return ends.norm(x), written

  def _blocks(self, params, x, shared, mask, memory):
    """Scans the blocks over x [B, T, D]; memory is () or (k, v, index)."""
    graph = _graph(self._module.Block, self.config, self.dtype)

    def block(carry, layer_and_params):
      x, memory = carry
      layer, params = layer_and_params

      def attend(queries, keys, values):
        keys, values, updated = _remember(memory, layer, keys, values)
        return layers.attend(queries, keys, values, mask), updated

      x, memory = nnx.merge(graph, params)(x, layer, shared, attend)
      return (sharding.split_rows(x), memory), None

    depth = jax.tree.leaves(params)[0].shape[0]
    unroll = min(self.unroll, depth)
    if self.remat != 'none':
      block = jax.checkpoint(block, policy=REMAT[self.remat], prevent_cse=False)
      # The loop keeps the recomputation apart from the first pass; without one XLA merges the two.
      unroll = min(unroll, max(depth // 2, 1))
    carry, _ = jax.lax.scan(block, (x, memory), (jnp.arange(depth), params), unroll=unroll)
    return carry

  def unembed(self, params, hidden):
    """Logits of the next token.

    Args:
      params: as for `forward`.
      hidden: [..., D] from `forward`.

    Returns:
      [..., V] float32.
    """
    if self.config.tie_word_embeddings:
      kernel = params['embed']['embedding'].T
    else:
      kernel = params['unembed']['kernel']
    return layers.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


@functools.lru_cache(maxsize=None)
def _graph(cls, config, dtype):
  """The static half of a module; the other half is the dict of its parameters."""
  return nnx.split(nnx.eval_shape(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0))))[0]


def _without(params, *names):
  return {name: value for name, value in params.items() if name not in names}


def _remember(memory, layer, keys, values):
  """Writes a layer's keys and values [B, T, K, H] into the cache; returns all of that layer's, [B, K, S, H].

  The whole cache is carried through the scan and written in place: as an output of the scan it
  would be copied every step.
  """
  keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
  if not memory:
    return keys, values, memory
  all_keys, all_values, index = memory
  start = (layer, 0, 0, index, 0)
  all_keys = jax.lax.dynamic_update_slice(all_keys, keys[None], start)
  all_values = jax.lax.dynamic_update_slice(all_values, values[None], start)
  keys = jax.lax.dynamic_index_in_dim(all_keys, layer, keepdims=False)
  values = jax.lax.dynamic_index_in_dim(all_values, layer, keepdims=False)
  return keys, values, (all_keys, all_values, index)
