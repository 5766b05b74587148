"""An encoder-decoder as functions of its parameters.

The encoder reads the prompt, the decoder writes the response.

Letters: B batch, P prompt length, R response length, T tokens of this call, S slots of the
decoder's cache, L decoder layers, V vocabulary, D width, N heads, H head width.

Parameters are a nested dict: 'embed', 'encoder' and 'decoder', whose 'blocks' have a leading axis
of layers, and 'unembed' unless it is tied to the embedding. Positions are relative, so masked
padding on either side changes nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax.models import base
from rlhf_jax.models import layers
from rlhf_jax.models import stack


@dataclasses.dataclass(frozen=True)
class Seq2Seq(base.LanguageModel):
  """An encoder-decoder; see base.LanguageModel.

  Adapters have paths like 'decoder/blocks/cross/query'.
  """

  encoder_decoder = True

  @property
  def has_token_states(self):
    return not self.config.pooled

  @property
  def _sides(self):
    """{'encoder' or 'decoder': (block class, number of blocks)}."""
    return {
      'encoder': (self._module.EncoderBlock, self.config.num_layers),
      'decoder': (self._module.DecoderBlock, self.config.num_decoder_layers),
    }

  def shapes(self):
    config = self.config
    tree = stack.shapes(self._module.Embedder, config)
    for side, (block, depth) in self._sides.items():
      tree[side] = stack.shapes(self._module.Side, config) | {
        'blocks': stack.shapes(block, config, depth=depth)
      }
    return self._with_unembed(tree)

  def encode(self, params, tokens, mask):
    """Runs the encoder.

    Args:
      params: Parameters from `init` or `hf.load`.
      tokens: [B, P] int32; those outside the mask are not read.
      mask: [B, P] bool.

    Returns:
      [B, P, D] in the compute dtype.
    """
    side = self._build(self._module.Side, params['encoder'], 'encoder')
    visible, bias = mask[:, None, None, None, :], side.bidirectional_bias(tokens.shape[1])

    def attend(queries, keys, values):
      return layers.attend(
        queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), visible, bias=bias
      ), ()

    x, _ = self._scan(
      params,
      'encoder',
      lambda block, layer, x, _: block(x, layer, None, attend),
      (self._embed(params, tokens, mask), ()),
    )
    return side.norm(x)

  def decode(self, params, tokens, mask, encoded, prompt_mask, cache=None):
    """Runs the decoder.

    Args:
      params: See `encode`.
      tokens: [B, T] int32, shifted right: the token at slot t predicts response token t.
      mask: [B, T] bool.
      encoded: [B, P, D] from `encode`; None with a cache.
      prompt_mask: [B, P] bool.
      cache: None, or a cache with at least T empty slots.

    Returns:
      Hidden states [B, T, D] after the final norm, in the compute dtype; and None, or the cache
      with these tokens written.
    """
    side = self._build(self._module.Side, params['decoder'], 'decoder')
    segments = mask.astype(jnp.int32)
    key_segments, index, kv_cache = segments, 0, ()
    if cache is not None:
      index, kv_cache = cache['index'], (cache['k'], cache['v'], cache['index'])
      key_segments = jax.lax.dynamic_update_slice(cache['segments'], segments, (0, index))
    causal = layers.attention_mask(segments, key_segments, index=index)
    bias = side.causal_bias(index, tokens.shape[1], key_segments.shape[1])

    def apply(block, layer, x, kv_cache):
      if cache is None:
        cross = [y.swapaxes(1, 2) for y in block.cross.keys_and_values(encoded)]
      else:
        cross = [
          jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False)
          for name in ('cross_k', 'cross_v')
        ]

      def attend(queries, keys, values):
        keys, values, updated = stack.update_cache(kv_cache, layer, keys, values)
        return layers.attend(queries, keys, values, causal, bias=bias), updated

      def cross_attend(queries):
        return layers.attend(queries, *cross, prompt_mask[:, None, None, None, :])

      return block(x, layer, attend, cross_attend)

    x, kv_cache = self._scan(
      params, 'decoder', apply, (self._embed(params, tokens, mask), kv_cache)
    )
    if cache is None:
      return side.norm(x), None
    written = {
      'k': kv_cache[0],
      'v': kv_cache[1],
      'segments': key_segments,
      'index': index + tokens.shape[1],
    }
    return side.norm(x), cache | written

  def unembed(self, params, hidden):
    if self.config.scale_decoder_outputs:
      hidden = hidden * self.config.width**-0.5
    return self._logits(params, hidden)

  def response_states(self, params, tokens, mask, response_length, frozen_states=None):
    """See base.LanguageModel; policy and reference share no layers, so `frozen_states` is None."""
    if frozen_states is not None:
      raise ValueError('an encoder-decoder has no frozen states: pass frozen_states=None')
    prompt, prompt_mask = tokens[:, :-response_length], mask[:, :-response_length]
    encoded = self.encode(params, prompt, prompt_mask)
    shifted = self._shift(tokens[:, -response_length:], mask[:, -response_length:])
    return self.decode(params, *shifted, encoded, prompt_mask)[0]

  def summary(self, params, tokens, mask):
    """See base.Base.

    The encoder and the decoder both read the text; the decoder's input is shifted right by one
    token. As in transformers' T5ForSequenceClassification, the state is the one that predicts the
    last real token.
    """
    # Moves real tokens to the left, so masked tokens between them do not add to their distance.
    order = jnp.argsort(~mask, axis=1, stable=True)
    tokens, mask = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    encoded = self.encode(params, tokens, mask)
    hidden, _ = self.decode(params, *self._shift(tokens, mask), encoded, mask)
    last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
    state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.tanh(self._embedder(params).pooler(state)) if self.config.pooled else state

  def prefill(self, params, tokens, mask, response_length):
    """See base.LanguageModel; also reads the decoder's start token."""
    encoded = self.encode(params, tokens, mask)
    batch, config = tokens.shape[0], self.config
    shape = (config.num_decoder_layers, batch, config.kv_heads, response_length, config.head_width)
    empty = sharding.split_rows(jnp.zeros(shape, self.dtype), axis=1)
    cross_k, cross_v = self._cross_keys_and_values(params, encoded)
    cache = {
      'k': empty,
      'v': empty,
      'index': jnp.zeros((), jnp.int32),
      'segments': sharding.split_rows(jnp.zeros((batch, response_length), jnp.int32)),
      'cross_k': cross_k,
      'cross_v': cross_v,
      'prompt': mask,
    }
    start = jnp.full((batch,), config.decoder_start_token_id, jnp.int32)
    return self.step(params, start, jnp.ones((batch,), bool), cache)

  def step(self, params, token, active, cache):
    hidden, cache = self.decode(
      params, token[:, None], active[:, None], None, cache['prompt'], cache
    )
    return hidden[:, 0], cache

  def _cross_keys_and_values(self, params, encoded):
    """Computes the cross-attention keys and values of all decoder layers, two [L, B, N, P, H]."""
    build = self._block_builder('decoder')

    def one(_, layer_params):
      return None, [
        sharding.split_rows(y.swapaxes(1, 2))
        for y in build(layer_params).cross.keys_and_values(encoded)
      ]

    return processes.scan(one, None, params['decoder']['blocks'])[1]

  def _shift(self, tokens, mask):
    """Shifts right-padded tokens and mask [B, T] right by one; the start token comes first."""
    start = jnp.full_like(tokens[:, :1], self.config.decoder_start_token_id)
    return (
      jnp.concatenate([start, tokens[:, :-1]], axis=1),
      jnp.concatenate([jnp.ones_like(mask[:, :1]), mask[:, :-1]], axis=1),
    )

  def _embed(self, params, tokens, mask):
    return sharding.split_rows(self._embedder(params).embed(jnp.where(mask, tokens, 0)))

  def _embedder(self, params):
    return self._build(self._module.Embedder, params, '')

  def _build(self, cls, params, prefix):
    return stack.build(cls, self.config, self.dtype, params, lora=self.lora, prefix=prefix)

  def _block_builder(self, side):
    return functools.partial(
      stack.build,
      self._sides[side][0],
      self.config,
      self.dtype,
      lora=self.lora,
      prefix=f'{side}/blocks',
    )

  def _scan(self, params, side, apply, carry):
    return stack.scan(
      self._block_builder(side),
      params[side]['blocks'],
      apply,
      carry,
      remat=self.remat,
      unroll=self.unroll,
    )
