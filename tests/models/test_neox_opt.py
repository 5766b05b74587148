"""Config fields of GPT-NeoX and OPT: released files, old and new names, errors; sharding."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models import trainable

NEOX = {
  'model_type': 'gpt_neox',
  'vocab_size': 32,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
}
OPT = {
  'model_type': 'opt',
  'vocab_size': 32,
  'hidden_size': 16,
  'ffn_dim': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
}

# As released.
PYTHIA_70M = {
  'architectures': ['GPTNeoXForCausalLM'],
  'bos_token_id': 0,
  'eos_token_id': 0,
  'hidden_act': 'gelu',
  'hidden_size': 512,
  'initializer_range': 0.02,
  'intermediate_size': 2048,
  'layer_norm_eps': 1e-05,
  'max_position_embeddings': 2048,
  'model_type': 'gpt_neox',
  'num_attention_heads': 8,
  'num_hidden_layers': 6,
  'rotary_emb_base': 10000,
  'rotary_pct': 0.25,
  'tie_word_embeddings': False,
  'torch_dtype': 'float16',
  'transformers_version': '4.24.0',
  'use_cache': True,
  'use_parallel_residual': True,
  'vocab_size': 50304,
}
OPT_125M = {
  '_name_or_path': 'opt-125m',
  'activation_dropout': 0.0,
  'activation_function': 'relu',
  'architectures': ['OPTForCausalLM'],
  'attention_dropout': 0.0,
  'bos_token_id': 2,
  'do_layer_norm_before': True,
  'dropout': 0.1,
  'eos_token_id': 2,
  'ffn_dim': 3072,
  'hidden_size': 768,
  'init_std': 0.02,
  'layerdrop': 0.0,
  'max_position_embeddings': 2048,
  'model_type': 'opt',
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'pad_token_id': 1,
  'prefix': '</s>',
  'torch_dtype': 'float16',
  'transformers_version': '4.21.0.dev0',
  'use_cache': True,
  'vocab_size': 50272,
  'word_embed_proj_dim': 768,
}
OPT_350M = OPT_125M | {
  '_name_or_path': 'opt-350m',
  'do_layer_norm_before': False,
  'ffn_dim': 4096,
  'hidden_size': 1024,
  'num_attention_heads': 16,
  'num_hidden_layers': 24,
  'word_embed_proj_dim': 512,
}


@pytest.mark.parametrize(
  'fields,width,parameters',
  [(PYTHIA_70M, 512, 70_426_624), (OPT_125M, 768, 125_239_296), (OPT_350M, 512, 331_196_416)],
)
def test_released_files_are_read_and_written(fields, width, parameters):
  model = models.create(fields)
  assert model.width == width
  assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes())) == parameters
  assert models.create(json.loads(json.dumps(model.config.to_hf()))) == model


def test_missing_fields_have_the_defaults_of_transformers():
  neox, opt = models.create(NEOX).config, models.create(OPT).config
  transformers = pytest.importorskip('transformers')
  for config, theirs in (
    (neox, transformers.GPTNeoXConfig(**NEOX)),
    (opt, transformers.OPTConfig(**OPT)),
  ):
    # An unknown field of theirs would be refused.
    again = models.create(
      theirs.to_dict() | {name: None for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    )
    assert again.config == config


def test_old_and_new_names_of_rope_are_one_model():
  def rope(**fields):
    return models.create(NEOX | fields).config.rope

  linear = {'rope_type': 'linear', 'factor': 2.0}
  old = rope(rotary_emb_base=300, rotary_pct=0.5, rope_scaling={'type': 'linear', 'factor': 2.0})
  assert old == rope(rope_parameters=linear | {'rope_theta': 300.0, 'partial_rotary_factor': 0.5})
  assert old == rope(
    rotary_emb_base=300,
    rotary_pct=0.5,
    rope_scaling=linear,
    rope_theta=300.0,
    partial_rotary_factor=0.5,
  )
  assert (old.rope_type, old.theta) == ('linear', 300.0)
  assert (old.rotary_fraction, old.rotary_width) == (0.5, 2)
  assert (rope().theta, rope().rotary_fraction, rope().rotary_width) == (10000.0, 0.25, 1)
  # The dict has priority, as in transformers.
  assert (
    rope(
      rotary_pct=0.5, rope_parameters={'rope_type': 'default', 'partial_rotary_factor': 1.0}
    ).rotary_fraction
    == 1.0
  )
  assert rope(rope_scaling={'type': 'dynamic', 'factor': 2.0}, rotary_pct=1).max_positions == 2048


@pytest.mark.parametrize(
  'rope_type', ['default', 'linear', 'dynamic', 'yarn', 'llama3', 'proportional']
)
def test_written_rope_is_read_back(rope_type):
  parameters = {'rope_type': rope_type, 'rope_theta': 77.0, 'partial_rotary_factor': 0.75}
  if rope_type != 'default':
    parameters['factor'] = 4.0
  if rope_type == 'llama3':
    parameters |= {
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 9,
    }
  model = models.create(NEOX | {'hidden_size': 32, 'rope_parameters': parameters})
  assert models.create(json.loads(json.dumps(model.config.to_hf()))) == model
  assert (model.config.rope.theta, model.config.rope.rotary_fraction) == (77.0, 0.75)


@pytest.mark.parametrize(
  'base,change,words',
  [
    (NEOX, {'num_attention_heads': 3}, 'num_attention_heads=3'),
    (NEOX, {'num_attention_heads': 16, 'rotary_pct': 1.0}, 'must be even'),
    (NEOX, {'rotary_pct': 1.5}, 'partial_rotary_factor=1.5'),
    (NEOX, {'rotary_pct': 0}, 'rotary_pct=0'),
    (NEOX, {'rope_theta': 500.0}, 'rope_theta=500.0'),
    (NEOX, {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    (NEOX, {'rope_scaling': {'type': 'mrope'}}, 'rope_scaling.rope_type="mrope"'),
    (
      NEOX,
      {
        'rope_scaling': {'type': 'linear', 'factor': 2.0},
        'rope_parameters': {'rope_type': 'default'},
      },
      'both',
    ),
    (NEOX, {'hidden_act': 'mish'}, 'hidden_act="mish"'),
    (NEOX, {'num_key_value_heads': 2}, 'num_key_value_heads=2'),
    (NEOX, {'use_parallel_residual': 1}, 'use_parallel_residual=1'),
    (NEOX, {'is_encoder_decoder': True}, 'is_encoder_decoder=true'),
    (NEOX, {'intermediate_size': None}, "'intermediate_size' is missing"),
    (OPT, {'num_attention_heads': 3}, 'num_attention_heads=3'),
    (OPT, {'activation_function': 'mish'}, 'activation_function="mish"'),
    (OPT, {'word_embed_proj_dim': 0}, 'word_embed_proj_dim=0'),
    (OPT, {'do_layer_norm_before': 'yes'}, 'do_layer_norm_before="yes"'),
    (OPT, {'quantization_config': {'bits': 4}}, 'quantization_config={"bits": 4}'),
    (OPT, {'intermediate_size': 24}, 'intermediate_size=24'),
    (OPT, {'ffn_dim': None}, "'ffn_dim' is missing"),
  ],
)
def test_refused(base, change, words):
  with pytest.raises(UserError) as error:
    models.create(base | change)
  assert words in str(error.value)


@pytest.mark.parametrize(
  'fields',
  [
    NEOX,
    NEOX | {'tie_word_embeddings': True, 'attention_bias': False},
    OPT,
    OPT | {'word_embed_proj_dim': 8, 'tie_word_embeddings': False},
    OPT | {'do_layer_norm_before': False},
    OPT | {'layer_norm_elementwise_affine': False, 'enable_bias': False},
  ],
)
def test_every_parameter_has_a_place_and_a_source(fields):
  model = models.create(fields)
  mesh = sharding.make_mesh({'fsdp': 2, 'tensor': 4})
  places = sharding.paths(sharding.shardings(model.shapes(), model.rules, mesh))
  sources = models.FAMILIES[model.family].sources(model.config)
  assert set(places) - {'unembed/kernel'} == set(sources)
  kernel = places['blocks/attention/query/kernel'].spec
  assert tuple(kernel) == (None, 'fsdp', 'tensor')


def test_dropout_and_the_prefix_of_a_prompt_are_nothing_of_the_model():
  for base in (NEOX, OPT):
    others = dict.fromkeys(
      ('dropout', 'hidden_dropout', 'layerdrop', 'classifier_dropout'), 0.1
    ) | {'prefix': '</s>'}
    assert models.create(base | others) == models.create(base)


def test_adapters_of_the_top_layers_beside_projections():
  """'.*' also matches the projections around the blocks, but only the top blocks get adapters."""
  model = models.create(OPT | {'word_embed_proj_dim': 8})
  adapted = dataclasses.replace(model, lora=lora.Lora((('.*', 2, 4.0),)))
  adapters, frozen = trainable.split_trainable(
    adapted, model.init(jax.random.key(0)), unfrozen_layers=1
  )
  draw = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), adapters)
  assert set(adapters) == {'top'}
  tokens, mask = draw.integers(3, 32, (2, 5)), np.ones((2, 5), bool)
  positions = np.broadcast_to(np.arange(5), tokens.shape)
  found, _ = adapted.forward(trainable.merge(frozen, adapters), tokens, positions, mask)
  expected, _ = model.forward(
    trainable.merge_lora(adapted, adapters, frozen), tokens, positions, mask
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
