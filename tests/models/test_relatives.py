"""Config fields of Llama's relatives: released files, missing and null fields, errors, output."""

import json

import pytest

from rlhf_jax import models
from rlhf_jax.errors import UserError

SIZES = {
  'vocab_size': 30,
  'hidden_size': 16,
  'intermediate_size': 12,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
}
MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3 = [
  SIZES | {'model_type': name}
  for name in ('mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'phi3')
]
SLIDING, FULL = 'sliding_attention', 'full_attention'
LINEAR = {'rope_type': 'linear', 'factor': 8.0}
LONG = {'type': 'su', 'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4}


def config(fields):
  return models.create(fields).config


@pytest.mark.parametrize(
  'fields',
  [
    # As released: Mistral 7B v0.3, Qwen2.5 0.5B, Qwen3 0.6B, Gemma 2B, Gemma 2 2B, Gemma 3 1B,
    # Phi-4-mini.
    {
      'model_type': 'mistral',
      'vocab_size': 32768,
      'hidden_size': 4096,
      'intermediate_size': 14336,
      'num_hidden_layers': 32,
      'num_attention_heads': 32,
      'num_key_value_heads': 8,
      'hidden_act': 'silu',
      'max_position_embeddings': 32768,
      'rms_norm_eps': 1e-5,
      'rope_theta': 1000000.0,
      'sliding_window': None,
      'tie_word_embeddings': False,
      'attention_dropout': 0.0,
    },
    {
      'model_type': 'qwen2',
      'vocab_size': 151936,
      'hidden_size': 896,
      'intermediate_size': 4864,
      'num_hidden_layers': 24,
      'num_attention_heads': 14,
      'num_key_value_heads': 2,
      'hidden_act': 'silu',
      'max_position_embeddings': 32768,
      'max_window_layers': 24,
      'rms_norm_eps': 1e-6,
      'rope_theta': 1000000.0,
      'sliding_window': 32768,
      'tie_word_embeddings': True,
      'use_mrope': False,
      'use_sliding_window': False,
    },
    {
      'model_type': 'qwen3',
      'vocab_size': 151936,
      'hidden_size': 1024,
      'intermediate_size': 3072,
      'num_hidden_layers': 28,
      'num_attention_heads': 16,
      'num_key_value_heads': 8,
      'head_dim': 128,
      'attention_bias': False,
      'hidden_act': 'silu',
      'max_position_embeddings': 40960,
      'max_window_layers': 28,
      'rms_norm_eps': 1e-6,
      'rope_scaling': None,
      'rope_theta': 1000000,
      'sliding_window': None,
      'tie_word_embeddings': True,
      'use_sliding_window': False,
    },
    {
      'model_type': 'gemma',
      'vocab_size': 256000,
      'hidden_size': 2048,
      'intermediate_size': 16384,
      'num_hidden_layers': 18,
      'num_attention_heads': 8,
      'num_key_value_heads': 1,
      'head_dim': 256,
      'attention_bias': False,
      'hidden_act': 'gelu',
      'hidden_activation': 'gelu_pytorch_tanh',
      'max_position_embeddings': 8192,
      'rms_norm_eps': 1e-6,
      'rope_scaling': None,
      'rope_theta': 10000.0,
    },
    {
      'model_type': 'gemma2',
      'vocab_size': 256000,
      'hidden_size': 2304,
      'intermediate_size': 9216,
      'num_hidden_layers': 26,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'head_dim': 256,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      'cache_implementation': 'hybrid',
      'hidden_act': 'gelu_pytorch_tanh',
      'hidden_activation': 'gelu_pytorch_tanh',
      'max_position_embeddings': 8192,
      'query_pre_attn_scalar': 256,
      'rms_norm_eps': 1e-6,
      'rope_theta': 10000.0,
      'sliding_window': 4096,
    },
    {
      'model_type': 'gemma3_text',
      'vocab_size': 262144,
      'hidden_size': 1152,
      'intermediate_size': 6912,
      'num_hidden_layers': 26,
      'num_attention_heads': 4,
      'num_key_value_heads': 1,
      'head_dim': 256,
      'attention_bias': False,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'cache_implementation': 'hybrid',
      'hidden_activation': 'gelu_pytorch_tanh',
      'max_position_embeddings': 32768,
      'query_pre_attn_scalar': 256,
      'rms_norm_eps': 1e-6,
      'rope_local_base_freq': 10000,
      'rope_scaling': None,
      'rope_theta': 1000000,
      'sliding_window': 512,
      'sliding_window_pattern': 6,
      'eos_token_id': [1, 106],
    },
    {
      'model_type': 'phi3',
      'vocab_size': 200064,
      'hidden_size': 3072,
      'intermediate_size': 8192,
      'num_hidden_layers': 32,
      'num_attention_heads': 24,
      'num_key_value_heads': 8,
      'hidden_act': 'silu',
      'attention_bias': False,
      'auto_map': {},
      'embd_pdrop': 0.0,
      'full_attn_mod': 1,
      'interpolate_factor': 1,
      'lm_head_bias': False,
      'mlp_bias': False,
      'max_position_embeddings': 131072,
      'rms_norm_eps': 1e-5,
      'original_max_position_embeddings': 4096,
      'partial_rotary_factor': 0.75,
      'resid_pdrop': 0.0,
      'rope_scaling': {'type': 'longrope', 'short_factor': [1.0] * 48, 'long_factor': [1.5] * 48},
      'rope_theta': 10000.0,
      'sliding_window': 262144,
      'tie_word_embeddings': True,
    },
  ],
  ids=lambda fields: fields['model_type'],
)
def test_released_files_are_read_and_written(fields):
  model = models.create(fields)
  assert models.create(json.loads(json.dumps(model.config.to_hf()))) == model


def test_a_missing_field_is_not_a_null_field():
  """A missing field has the default of transformers; a null field turns the feature off."""
  assert config(MISTRAL).windows == (4096,) * 3
  assert config(MISTRAL | {'sliding_window': None}).windows == (0,) * 3
  assert (config(GEMMA2).score_cap, config(GEMMA2).logit_cap) == (50.0, 30.0)
  without = config(GEMMA2 | {'attn_logit_softcapping': None, 'final_logit_softcapping': None})
  assert (without.score_cap, without.logit_cap) == (0.0, 0.0)
  assert config(PHI3).windows == (0,) * 3
  assert config({**MISTRAL, 'num_attention_heads': 8, 'num_key_value_heads': None}).kv_heads == 8
  few = {
    name: value
    for name, value in MISTRAL.items()
    if name not in ('num_key_value_heads', 'head_dim')
  }
  assert config(few | {'num_attention_heads': 8}).kv_heads == 8
  assert (
    config({name: value for name, value in QWEN3.items() if name != 'head_dim'}).head_width == 128
  )


@pytest.mark.parametrize(
  'fields,windows',
  [
    (QWEN2 | {'sliding_window': 5}, (0, 0, 0)),
    (QWEN2 | {'sliding_window': 5, 'use_sliding_window': True, 'max_window_layers': 1}, (0, 5, 5)),
    (QWEN2 | {'sliding_window': 5, 'use_sliding_window': True, 'max_window_layers': 0}, (5, 5, 5)),
    (
      QWEN2 | {'sliding_window': None, 'use_sliding_window': True, 'max_window_layers': 0},
      (0, 0, 0),
    ),
    (
      QWEN3
      | {'sliding_window': 5, 'use_sliding_window': True, 'layer_types': [SLIDING, FULL, SLIDING]},
      (5, 0, 5),
    ),
    (GEMMA2 | {'sliding_window': 5}, (5, 0, 5)),
    (GEMMA2 | {'sliding_window': 5, 'layer_types': [FULL, FULL, SLIDING]}, (0, 0, 5)),
    (GEMMA3 | {'sliding_window': 5}, (5, 5, 5)),
    (GEMMA3 | {'sliding_window': 5, 'sliding_window_pattern': 2}, (5, 0, 5)),
    (
      GEMMA3
      | {'sliding_window': 5, '_sliding_window_pattern': 2, 'layer_types': [FULL, FULL, SLIDING]},
      (0, 0, 5),
    ),
  ],
)
def test_windows(fields, windows):
  found = config(fields)
  assert found.windows == windows
  assert config(found.to_hf()).windows == windows


def test_gemma_means_the_tanh_by_gelu():
  assert (
    config(GEMMA | {'hidden_act': 'gelu'})
    == config(GEMMA | {'hidden_act': 'gelu_pytorch_tanh'})
    == config(GEMMA)
  )


def test_gemma3_has_two_ropes():
  plain = config(GEMMA3)
  assert (plain.rope.theta, plain.local_rope.theta) == (1e6, 1e4)
  old = GEMMA3 | {'rope_theta': 3e5, 'rope_local_base_freq': 2e3, 'rope_scaling': LINEAR}
  new = {FULL: LINEAR | {'rope_theta': 3e5}, SLIDING: {'rope_type': 'default', 'rope_theta': 2e3}}
  assert config(old) == config(GEMMA3 | {'rope_parameters': new})
  assert (config(old).rope.factor, config(old).local_rope.rope_type) == (8.0, 'default')
  assert 'rope_parameters' not in config(old).to_hf()
  both = config(GEMMA3 | {'rope_parameters': {FULL: None, SLIDING: LINEAR}})
  assert (both.rope.theta, both.local_rope.theta, both.local_rope.factor) == (1e6, 1e4, 8.0)
  assert config(both.to_hf()) == both


def test_phi3_takes_the_original_length_from_outside():
  inside = LONG | {'original_max_position_embeddings': 7}
  assert config(PHI3 | {'rope_scaling': inside}).rope.original_max_position_embeddings == 4096
  found = config(
    PHI3 | {'rope_scaling': inside | {'type': 'yarn'}, 'original_max_position_embeddings': 9}
  )
  assert found.rope.rope_type == 'longrope' and found.rope.original_max_position_embeddings == 9
  assert found.to_hf()['original_max_position_embeddings'] == 9
  assert config(found.to_hf()) == found


@pytest.mark.parametrize(
  'base,change,words',
  [
    (MISTRAL, {'layer_types': [FULL] * 3}, 'layer_types=['),
    (MISTRAL, {'attention_bias': True}, 'attention_bias=true'),
    (MISTRAL, {'sliding_window': 0}, 'sliding_window=0'),
    (MISTRAL, {'num_key_value_heads': 3}, 'num_key_value_heads=3'),
    (MISTRAL, {'rms_norm_eps': None}, "'rms_norm_eps' is missing"),
    (QWEN2, {'use_mrope': True}, 'use_mrope=true'),
    (QWEN2, {'max_window_layers': -1}, 'max_window_layers=-1'),
    (QWEN2, {'layer_types': [SLIDING] * 3}, 'needs sliding_window to be set'),
    (QWEN2, {'layer_types': [FULL] * 2}, 'must be a list of 3 entries'),
    (QWEN3, {'layer_types': ['chunked_attention'] * 3}, 'chunked_attention'),
    (QWEN3, {'mlp_bias': True}, 'mlp_bias=true'),
    (GEMMA, {'use_bidirectional_attention': True}, 'use_bidirectional_attention=true'),
    (GEMMA, {'hidden_activation': 'relu'}, 'hidden_activation="relu"'),
    (GEMMA2, {'hidden_act': 'relu'}, 'hidden_act="relu"'),
    (GEMMA2, {'sliding_window_size': 7}, 'sliding_window_size=7'),
    (GEMMA2, {'sliding_window': None}, 'needs sliding_window to be set'),
    (GEMMA2, {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar=0'),
    (GEMMA2, {'attn_logit_softcapping': -1.0}, 'attn_logit_softcapping=-1.0'),
    (GEMMA3, {'use_bidirectional_attention': True}, 'use_bidirectional_attention=true'),
    (GEMMA3, {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
    (GEMMA3, {'_sliding_window_pattern': 2}, '_sliding_window_pattern=2'),
    (GEMMA3, {'rope_parameters': LINEAR}, 'rope_type="linear"'),
    (GEMMA3, {'rope_parameters': {FULL: LINEAR}, 'rope_scaling': LINEAR}, 'both present'),
    (GEMMA3, {'rope_parameters': {FULL: LINEAR | {'beta_fast': 2.0}}}, 'beta_fast=2.0'),
    (
      GEMMA3,
      {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'truncate': False}},
      'truncate=false',
    ),
    (
      GEMMA3,
      {'model_type': 'gemma3', 'text_config': {}},
      "only the text model is supported, with model_type 'gemma3_text'",
    ),
    (PHI3, {'rope_scaling': LINEAR}, 'rope_scaling.rope_type="linear"'),
    (PHI3, {'partial_rotary_factor': 1.5}, 'partial_rotary_factor=1.5'),
    (PHI3, {'rope_scaling': LONG | {'short_factor': [1.0] * 3}}, 'short_factor=[1.0, 1.0, 1.0]'),
    (PHI3, {'full_attn_mod': 2}, 'full_attn_mod=2'),
    (PHI3, {'lm_head_bias': True}, 'lm_head_bias=true'),
  ],
)
def test_refused(base, change, words):
  with pytest.raises(UserError) as error:
    config(base | change)
  assert words in str(error.value)
