"""Adapters against PEFT on the same weights: each reads what the other writes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft
from rlhf_jax.models import trainable

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
theirs = pytest.importorskip('peft')

TINY = dict(vocab_size=29, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def gpt2():
  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      n_embd=12, n_head=2, n_layer=3, n_positions=16, tie_word_embeddings=False, **TINY
    )
  )


def llama():
  return transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      hidden_size=16,
      intermediate_size=20,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      attention_bias=True,
      tie_word_embeddings=False,
      **TINY,
    )
  )


def phi3():
  return transformers.Phi3ForCausalLM(
    transformers.Phi3Config(
      hidden_size=16,
      intermediate_size=20,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      **TINY,
    )
  )


def t5():
  return transformers.T5ForConditionalGeneration(
    transformers.T5Config(
      d_model=12,
      d_kv=5,
      d_ff=20,
      num_layers=2,
      num_decoder_layers=3,
      num_heads=2,
      feed_forward_proj='gated-gelu',
      tie_word_embeddings=False,
      decoder_start_token_id=2,
      **TINY,
    )
  )


# Family, our targets, and PEFT's.
CASES = {
  'gpt2': (
    gpt2,
    (('attention/(query|value)$', 3, 6.0), ('mlp/up$', 2, 5.0), ('unembed', 4, 2.0)),
    dict(target_modules=['c_attn', 'c_proj', 'lm_head'], fan_in_fan_out=True),
  ),
  'llama': (
    llama,
    (('attention/(query|key)$', 2, 8.0), ('gate$', 5, 4.0)),
    dict(
      target_modules=['q_proj', 'down_proj', 'lm_head'],
      rank_pattern={'q_proj': 3},
      alpha_pattern={r'layers\.\d+\.mlp.down_proj': 7},
    ),
  ),
  'phi3': (
    phi3,
    (('attention/(query|value)$', 2, 8.0), ('mlp/(gate|up)$', 3, 4.0)),
    dict(target_modules=['qkv_proj', 'o_proj', 'gate_up_proj']),
  ),
  't5': (
    t5,
    (('attention/(query|value)$', 2, 8.0), ('decoder/blocks/mlp/up$', 3, 4.0)),
    dict(target_modules=['q', 'k', 'wo']),
  ),
}


@pytest.fixture(params=CASES, scope='module')
def case(request, tmp_path_factory):
  build, targets, options = CASES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  torch.manual_seed(0)
  build().save_pretrained(folder)
  return build, folder, targets, options


def base_of(build, folder):
  """Returns the same weights each time, because PEFT changes the model that it adapts."""
  return build().from_pretrained(folder).eval()


def rows():
  rng = np.random.default_rng(1)
  return rng.integers(3, TINY['vocab_size'], (3, 7)).astype(np.int32), rng.integers(
    3, 29, (3, 5)
  ).astype(np.int32)


def our_logits(model, params):
  prompt, response = rows()
  tokens = np.concatenate([prompt, response], axis=1)

  @jax.jit
  def run(params, tokens):
    states = model.response_states(params, tokens, jnp.ones(tokens.shape, bool), response.shape[1])
    return model.unembed(params, states)

  return np.asarray(run(params, tokens))


def their_logits(model):
  prompt, response = (torch.tensor(x).long() for x in rows())
  with torch.no_grad():
    if not model.config.is_encoder_decoder:
      return model(torch.cat([prompt, response], 1)).logits[:, -response.shape[1] - 1 : -1].numpy()
    start = torch.full((len(response), 1), model.config.decoder_start_token_id)
    return model(
      input_ids=prompt, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)
    ).logits.numpy()


def drawn(adapters, seed):
  """Returns adapters whose B is not 0."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), adapters)


@pytest.mark.parametrize('rslora', [False, True])
def test_peft_reads_what_we_write(case, rslora, tmp_path):
  build, folder, targets, _ = case
  plain, params = hf.load(folder)
  model = dataclasses.replace(plain, lora=lora_lib.Lora(targets, rslora=rslora))
  adapters, frozen = trainable.split_trainable(model, params)
  np.testing.assert_array_equal(
    our_logits(model, trainable.merge(frozen, adapters)),
    our_logits(plain, params),
    'B is zero at the start',
  )
  adapters = drawn(adapters, 2)
  peft.save(tmp_path, model, adapters)
  ours = our_logits(model, trainable.merge(frozen, adapters))
  assert np.abs(ours - our_logits(plain, params)).max() > 1e-2
  adapted = theirs.PeftModel.from_pretrained(base_of(build, folder), tmp_path).eval()
  np.testing.assert_allclose(their_logits(adapted), ours, rtol=0, atol=1e-5)
  merged = trainable.merge_lora(model, adapters, frozen)
  np.testing.assert_allclose(our_logits(plain, merged), ours, rtol=0, atol=1e-5)
  lora, again = peft.load(tmp_path, plain)
  np.testing.assert_allclose(
    our_logits(dataclasses.replace(plain, lora=lora), trainable.merge(params, again)),
    ours,
    rtol=0,
    atol=1e-5,
  )


@pytest.mark.parametrize('rslora', [False, True])
def test_we_read_what_peft_writes(case, rslora, tmp_path):
  build, folder, _, options = case
  config = theirs.LoraConfig(
    r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=False, **options
  )
  torch.manual_seed(3)
  adapted = theirs.get_peft_model(base_of(build, folder), config).eval()
  adapted.save_pretrained(tmp_path)
  plain, params = hf.load(folder)
  lora, adapters = peft.load(tmp_path, plain)
  model = dataclasses.replace(plain, lora=lora)
  ours = our_logits(model, trainable.merge(params, adapters))
  assert np.abs(ours - our_logits(plain, params)).max() > 1e-2
  np.testing.assert_allclose(ours, their_logits(adapted), rtol=0, atol=1e-5)
  np.testing.assert_allclose(
    our_logits(plain, trainable.merge_lora(model, adapters, params)),
    their_logits(adapted.merge_and_unload()),
    rtol=0,
    atol=1e-5,
  )


@pytest.mark.parametrize('case', ['gpt2', 'llama'], indirect=True)
def test_a_weighted_sum_is_that_of_peft(case, tmp_path):
  build, folder, _, options = case
  adapted = base_of(build, folder)
  for name, rank in (('one', 4), ('two', 3)):
    ours = options | {'rank_pattern': {}}
    config = theirs.LoraConfig(r=rank, lora_alpha=6, init_lora_weights=False, **ours)
    torch.manual_seed(rank)
    if name == 'one':
      adapted = theirs.get_peft_model(adapted, config, name).eval()
    else:
      adapted.add_adapter(name, config)
  adapted.save_pretrained(tmp_path)
  adapted.add_weighted_adapter(['one', 'two'], [0.7, -0.4], 'sum', combination_type='cat')
  adapted.set_adapter('sum')
  plain, params = hf.load(folder)
  parts = [(*peft.load(tmp_path / name, plain), w) for name, w in (('one', 0.7), ('two', -0.4))]
  lora, combined = lora_lib.weighted_sum(parts)
  model = dataclasses.replace(plain, lora=lora)
  expected, close = their_logits(adapted.eval()), dict(rtol=1e-5, atol=1e-5)
  found = our_logits(model, trainable.merge(params, combined))
  np.testing.assert_allclose(found, expected, **close)
  peft.save(tmp_path / 'sum', model, combined)
  again = theirs.PeftModel.from_pretrained(base_of(build, folder), tmp_path / 'sum').eval()
  np.testing.assert_allclose(their_logits(again), expected, **close)
  assert np.abs(expected - their_logits(base_of(build, folder))).max() > 1e-2


def test_adapters_of_the_top_layers_are_written_for_these(tmp_path):
  torch.manual_seed(0)
  gpt2().save_pretrained(tmp_path / 'base')
  plain, params = hf.load(tmp_path / 'base')
  model = dataclasses.replace(plain, lora=lora_lib.Lora((('attention/query$', 2, 4.0),)))
  adapters, frozen = trainable.split_trainable(model, params, unfrozen_layers=1)
  adapters = drawn(adapters, 1)
  peft.save(tmp_path / 'adapter', model, adapters)
  adapted = theirs.PeftModel.from_pretrained(
    base_of(gpt2, tmp_path / 'base'), tmp_path / 'adapter'
  ).eval()
  ours = our_logits(model, trainable.merge(frozen, adapters))
  np.testing.assert_allclose(their_logits(adapted), ours, rtol=0, atol=1e-5)


def test_merging_changes_the_adapted_kernels(case):
  _, folder, targets, _ = case
  plain, params = hf.load(folder)
  lora = lora_lib.Lora(targets)
  adapters = drawn(lora_lib.init(jax.random.key(0), params, lora), 4)
  merged = lora_lib.merge(params, adapters, lora)
  before = sharding.paths(params)
  changed = {
    name for name, leaf in sharding.paths(merged).items() if np.abs(leaf - before[name]).max() > 0
  }
  adapted = {
    name.removesuffix('/lora/a') for name in sharding.paths(adapters) if name.endswith('/a')
  }
  assert changed == {f'{name}/kernel' for name in adapted}


def broken(tmp_path, change):
  """Returns a folder of a changed llama adapter, and its model."""
  torch.manual_seed(0)
  llama().save_pretrained(tmp_path / 'base')
  plain, params = hf.load(tmp_path / 'base')
  model = dataclasses.replace(plain, lora=lora_lib.Lora((('attention/query$', 2, 4.0),)))
  peft.save(tmp_path / 'adapter', model, trainable.split_trainable(model, params)[0])
  config = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text()) | change
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(config))
  return tmp_path / 'adapter', plain


@pytest.mark.parametrize(
  'change,message',
  [
    ({'use_dora': True}, 'use_dora'),
    ({'peft_type': 'IA3'}, 'IA3'),
    ({'bias': 'all'}, "bias='all'"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'some_new_field': 3}, 'some_new_field'),
  ],
)
def test_adapters_that_compute_something_else_are_refused(change, message, tmp_path):
  folder, model = broken(tmp_path, change)
  with pytest.raises(UserError, match=message):
    peft.load(folder, model)


def test_an_adapter_of_another_model_is_refused(tmp_path):
  folder, _ = broken(tmp_path, {})
  torch.manual_seed(0)
  gpt2().save_pretrained(tmp_path / 'gpt2')
  with pytest.raises(UserError, match='match no linear map.*q_proj'):
    peft.load(folder, hf.load(tmp_path / 'gpt2')[0])


def test_a_pattern_without_matches_is_named():
  with pytest.raises(UserError, match="'atention'.*blocks/attention/query"):
    lora_lib.init(
      jax.random.key(0),
      {'blocks': {'attention': {'query': {'kernel': jnp.zeros((1, 2, 2))}}}},
      lora_lib.Lora((('atention', 1, 1.0),)),
    )
