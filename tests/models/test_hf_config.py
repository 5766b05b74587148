"""Every field of a config.json is used, known to be irrelevant, or refused by name."""

import json

import pytest

from rlhf_jax import models
from rlhf_jax.errors import UserError

GPT2 = {'model_type': 'gpt2', 'vocab_size': 30, 'n_embd': 8, 'n_layer': 2, 'n_head': 2}
LLAMA = {
  'model_type': 'llama',
  'vocab_size': 30,
  'hidden_size': 8,
  'intermediate_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
}


@pytest.mark.parametrize(
  'base,change,words',
  [
    (GPT2, {'add_cross_attention': True}, 'add_cross_attention=true'),
    (GPT2, {'is_encoder_decoder': True}, 'is_encoder_decoder=true'),
    (GPT2, {'activation_function': 'mish'}, 'activation_function="mish"'),
    (GPT2, {'activation_function': ['relu']}, 'activation_function'),
    (GPT2, {'n_head': 3}, 'n_head=3'),
    (GPT2, {'n_ctx': 7}, 'n_ctx=7'),
    (GPT2, {'n_embd': '8'}, 'n_embd="8"'),
    (GPT2, {'n_layer': 0}, 'n_layer=0'),
    (GPT2, {'vocab_size': None}, "'vocab_size' is missing"),
    (GPT2, {'scale_attn_weights': 1}, 'scale_attn_weights=1'),
    (GPT2, {'quantization_config': {'bits': 4}}, 'quantization_config={"bits": 4}'),
    (GPT2, {'eos_token_id': 'x'}, 'eos_token_id="x"'),
    (LLAMA, {'hidden_act': 'xielu'}, 'hidden_act="xielu"'),
    (LLAMA, {'sliding_window': 4096}, 'sliding_window=4096'),
    (LLAMA, {'num_key_value_heads': 3}, 'num_key_value_heads=3'),
    (LLAMA, {'num_attention_heads': 3}, 'num_attention_heads=3'),
    (LLAMA, {'head_dim': 3}, 'head_dim=3'),
    (LLAMA, {'rope_interleaved': True}, 'rope_interleaved=true'),
    (LLAMA, {'rms_norm_eps': -1}, 'rms_norm_eps=-1'),
    (LLAMA, {'rope_scaling': {'type': 'mrope', 'factor': 2.0}}, 'rope_scaling.rope_type="mrope"'),
    (
      LLAMA,
      {'rope_parameters': {'rope_type': 'axial', 'factor': 2.0}},
      'rope_parameters.rope_type="axial"',
    ),
    (
      LLAMA,
      {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}},
      'partial_rotary_factor=0.5',
    ),
    (
      LLAMA,
      {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'beta_fast': 1}},
      'beta_fast=1',
    ),
    (
      LLAMA,
      {'rope_parameters': {'rope_type': 'llama3', 'factor': 2.0}},
      "'low_freq_factor' is missing",
    ),
    (
      LLAMA,
      {
        'rope_scaling': {'type': 'linear', 'factor': 2.0},
        'rope_parameters': {'rope_type': 'default'},
      },
      'both',
    ),
    (LLAMA, {'rope_scaling': 'linear'}, 'rope_scaling="linear"'),
  ],
)
def test_refused(base, change, words):
  with pytest.raises(UserError) as error:
    models.create(base | change)
  assert words in str(error.value)


@pytest.mark.parametrize('base', [GPT2, LLAMA])
def test_fields_about_other_things_are_accepted(base):
  models.create(
    base
    | {
      'torch_dtype': 'bfloat16',
      'transformers_version': '4.0',
      'use_cache': True,
      'architectures': ['X'],
      'attention_dropout': 0.1,
      'task_specific_params': {},
      'n_ctx': None,
    }
  )


@pytest.mark.parametrize(
  'fields',
  [
    GPT2
    | {
      'n_inner': 20,
      'activation_function': 'relu',
      'eos_token_id': [1, 2],
      'tie_word_embeddings': False,
    },
    LLAMA
    | {'head_dim': 6, 'rope_scaling': {'type': 'linear', 'factor': 2}, 'rope_theta': 500000.0},
    LLAMA
    | {
      'rope_scaling': {
        'rope_type': 'llama3',
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
      },
      'num_key_value_heads': 2,
    },
  ],
)
def test_written_config_reads_back(fields):
  model = models.create(fields)
  assert models.create(json.loads(json.dumps(model.config.to_hf()))) == model


def test_old_and_new_spelling_of_rope_are_one_model():
  old = LLAMA | {'rope_theta': 300.0, 'rope_scaling': {'type': 'linear', 'factor': 4}}
  new = LLAMA | {'rope_parameters': {'rope_theta': 300.0, 'rope_type': 'linear', 'factor': 4.0}}
  assert models.create(old) == models.create(new) != models.create(LLAMA)
