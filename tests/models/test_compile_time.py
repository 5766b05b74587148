"""Programs do not grow with depth, because layers are scanned."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

from rlhf_jax import models

BATCH, PROMPT, RESPONSE, VOCABULARY = 2, 3, 5, 31
SHALLOW, DEEP = 4, 32

SIZES = {'hidden_size': 12, 'intermediate_size': 20, 'num_attention_heads': 2}
GROUPED = SIZES | {'num_key_value_heads': 1}
WINDOWED = GROUPED | {'head_dim': 6, 'sliding_window': 3}
FIELDS = {
  'bert': SIZES,
  'gemma': GROUPED | {'head_dim': 6},
  'gemma2': WINDOWED,
  'gemma3_text': WINDOWED | {'sliding_window_pattern': 2},
  'gpt2': {'n_embd': 12, 'n_head': 2},
  'gpt_neox': SIZES,
  'llama': GROUPED,
  'mistral': WINDOWED,
  'opt': {'hidden_size': 12, 'ffn_dim': 20, 'num_attention_heads': 2},
  'phi3': GROUPED | {'sliding_window': 3},
  'qwen2': WINDOWED | {'use_sliding_window': True, 'max_window_layers': 2},
  'qwen3': WINDOWED | {'use_sliding_window': True, 'max_window_layers': 2},
  'roberta': SIZES | {'pad_token_id': 0},
  't5': {'d_model': 12, 'd_kv': 6, 'd_ff': 20, 'num_heads': 2, 'pad_token_id': 0},
}
DEPTHS = {'gpt2': ['n_layer'], 't5': ['num_layers', 'num_decoder_layers']}


def build(family, depth):
  """Returns a tiny model with `depth` layers."""
  depths = dict.fromkeys(DEPTHS.get(family, ['num_hidden_layers']), depth)
  return models.create({'family': family, 'vocab_size': VOCABULARY} | FIELDS[family] | depths)


def lower(family, depth, program):
  """Traces the program 'forward' or 'train_step' of a model on shapes."""
  model = build(family, depth)
  optimizer = optax.adam(1e-3)
  params = model.shapes()
  tokens = jax.ShapeDtypeStruct((BATCH, PROMPT + RESPONSE), jnp.int32)
  mask = jax.ShapeDtypeStruct(tokens.shape, bool)

  def forward(params, tokens, mask):
    if isinstance(model, models.Encoder):
      return model.summary(params, tokens, mask)
    return model.unembed(params, model.response_states(params, tokens, mask, RESPONSE))

  def train_step(params, opt_state, tokens, mask):
    gradient = jax.grad(lambda params: jnp.square(forward(params, tokens, mask)).mean())(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state

  if program == 'forward':
    return jax.jit(forward).lower(params, tokens, mask)
  return jax.jit(train_step).lower(params, jax.eval_shape(optimizer.init, params), tokens, mask)


def test_every_family_is_here():
  assert set(FIELDS) == set(models.FAMILIES) - {'gemma3'}  # a known name that is refused


@pytest.mark.parametrize('program', ['forward', 'train_step'])
@pytest.mark.parametrize('family', FIELDS)
def test_a_deep_model_is_no_longer_program(family, program):
  shallow, deep = (lower(family, depth, program).as_text().count('\n') for depth in (SHALLOW, DEEP))
  assert shallow > 100, 'this is no model'
  assert abs(deep - shallow) <= 0.05 * shallow


@pytest.fixture
def no_cache():
  """Disables the compilation cache."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', before)


@pytest.mark.slow
@pytest.mark.parametrize('program', ['forward', 'train_step'])
@pytest.mark.parametrize('family', FIELDS)
def test_a_deep_model_compiles_as_fast(family, program, no_cache):
  """Compares the shortest of three times each, in turns, because the machine may be shared."""

  def seconds(depth):
    begin = time.perf_counter()
    lower(family, depth, program).compile()
    return time.perf_counter() - begin

  times = [(seconds(SHALLOW), seconds(DEEP)) for _ in range(3)]
  shallow, deep = (min(column) for column in zip(*times))
  assert deep < 1.5 * shallow
