"""Logits and files of random small models against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.types import positions_from_mask

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

LENGTH = 14


def gpt2_reference(seed):
  """A random GPT-2 of transformers, all parameters (norms and biases too) drawn."""
  draw = np.random.default_rng(seed)
  count = int(draw.choice([1, 2, 3]))
  config = transformers.GPT2Config(
      vocab_size=int(draw.integers(17, 60)), n_positions=LENGTH + 2, n_embd=count * int(draw.choice([3, 5, 8])),
      n_layer=int(draw.integers(1, 4)), n_head=count, n_inner=[None, 13, 24][draw.integers(3)],
      activation_function=str(draw.choice(['gelu_new', 'gelu', 'relu', 'silu', 'gelu_pytorch_tanh'])),
      layer_norm_epsilon=float(draw.choice([1e-5, 1e-3])), scale_attn_weights=bool(draw.integers(2)),
      scale_attn_by_inverse_layer_idx=bool(draw.integers(2)), reorder_and_upcast_attn=bool(draw.integers(2)),
      tie_word_embeddings=bool(draw.integers(2)), bos_token_id=0, eos_token_id=1, pad_token_id=2)
  return randomize(transformers.GPT2LMHeadModel(config), seed)


def llama_reference(seed):
  """A random Llama of transformers."""
  draw = np.random.default_rng(seed)
  kv_heads, groups = int(draw.choice([1, 2])), int(draw.choice([1, 2, 3]))
  count = kv_heads * groups
  theta = float(draw.choice([100.0, 10000.0, 500000.0]))
  rope = [{'rope_type': 'default'}, {'rope_type': 'linear', 'factor': 2.5},
          {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 16}][draw.integers(3)]
  head_width = int(draw.choice([2, 4, 6]))
  config = transformers.LlamaConfig(
      vocab_size=int(draw.integers(17, 60)), hidden_size=count * int(draw.choice([3, 4, 7])),
      intermediate_size=int(draw.integers(7, 40)), num_hidden_layers=int(draw.integers(1, 4)),
      num_attention_heads=count, num_key_value_heads=kv_heads, head_dim=head_width, max_position_embeddings=64,
      hidden_act=str(draw.choice(['silu', 'gelu', 'gelu_pytorch_tanh'])), rms_norm_eps=float(draw.choice([1e-6, 1e-3])),
      rope_parameters={'rope_theta': theta, **rope}, attention_bias=bool(draw.integers(2)),
      mlp_bias=bool(draw.integers(2)), tie_word_embeddings=bool(draw.integers(2)),
      bos_token_id=0, eos_token_id=1, pad_token_id=2)
  return randomize(transformers.LlamaForCausalLM(config), seed)


def randomize(reference, seed):
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return reference.eval()


def padded_batches(vocab_size, seed):
  """Tokens [4, T] and mask: rows padded on the left, on the right, and not at all."""
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, vocab_size, (4, LENGTH)).astype(np.int32)
  mask = np.ones((4, LENGTH), bool)
  mask[0, :5] = False
  mask[1, :LENGTH - 1] = False
  mask[2, 6:] = False
  return tokens, mask


def our_logits(model, params, tokens, mask):
  @jax.jit
  def logits(params, tokens, mask):
    hidden, _ = model.forward(params, tokens, positions_from_mask(mask), mask)
    return model.unembed(params, hidden)
  return np.asarray(logits(params, tokens, jnp.asarray(mask)))


def their_logits(reference, tokens, mask):
  positions = np.asarray(positions_from_mask(jnp.asarray(mask)))
  with torch.no_grad():
    output = reference(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(),
                       position_ids=torch.tensor(positions).long())
  return output.logits.numpy()


REFERENCES = [(make, seed) for make in (gpt2_reference, llama_reference) for seed in range(16)]


@pytest.mark.parametrize('make,seed', REFERENCES, ids=lambda value: getattr(value, '__name__', value))
def test_logits_agree_at_real_positions(make, seed, tmp_path):
  reference = make(seed)
  reference.save_pretrained(tmp_path)
  model, params = hf.load(tmp_path)
  tokens, mask = padded_batches(model.vocab_size, seed)
  theirs = their_logits(reference, tokens, mask)
  assert np.abs(theirs[mask]).max() > 0.1, 'a model without signal tests nothing'
  np.testing.assert_allclose(our_logits(model, params, tokens, mask)[mask], theirs[mask], rtol=0, atol=2e-4)


@pytest.mark.parametrize('make,seed', [(gpt2_reference, 0), (gpt2_reference, 1), (llama_reference, 0),
                                       (llama_reference, 1), (llama_reference, 2), (llama_reference, 5)])
def test_saved_folder_loads_in_transformers_and_in_ours(make, seed, tmp_path):
  reference = make(seed)
  reference.save_pretrained(tmp_path / 'theirs')
  model, params = hf.load(tmp_path / 'theirs')
  hf.save(tmp_path / 'ours', model, params, max_shard_bytes=3000)
  assert len(list((tmp_path / 'ours').glob('*.safetensors'))) > 1
  reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
  assert type(reloaded) is type(reference)
  tokens, mask = padded_batches(model.vocab_size, seed)
  theirs = their_logits(reference, tokens, mask)
  np.testing.assert_allclose(their_logits(reloaded, tokens, mask)[mask], theirs[mask], rtol=0, atol=1e-5)
  again, params_again = hf.load(tmp_path / 'ours')
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize('make', [gpt2_reference, llama_reference])
def test_reward_model_of_transformers(make, tmp_path):
  """Scores of a sequence classifier with one label: ours of its file, theirs of ours."""
  config = make(3).config
  config.num_labels = 1
  reference = randomize(transformers.AutoModelForSequenceClassification.from_config(config), 3)
  reference.save_pretrained(tmp_path / 'theirs')
  model, params = hf.load_reward(tmp_path / 'theirs')
  draw = np.random.default_rng(0)
  tokens = draw.integers(3, model.vocab_size, (3, LENGTH)).astype(np.int32)
  mask = np.ones((3, LENGTH), bool)
  mask[0, 9:], mask[1, 4:] = False, False
  tokens[~mask] = config.pad_token_id

  @jax.jit
  def score(params, tokens, mask):
    hidden, _ = model.forward(params['backbone'], tokens, positions_from_mask(mask), mask)
    return heads.last_token(heads.apply_scalar(params['head'], hidden), mask)

  def their_scores(reference):
    with torch.no_grad():
      return reference(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()[:, 0]

  np.testing.assert_allclose(np.asarray(score(params, tokens, mask)), their_scores(reference), rtol=0, atol=2e-4)
  hf.save(tmp_path / 'ours', model, params['backbone'], head=params['head'])
  reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'ours').eval()
  assert reloaded.config.num_labels == 1
  np.testing.assert_allclose(their_scores(reloaded), their_scores(reference), rtol=0, atol=1e-6)


def test_bfloat16_file_and_parameters(tmp_path):
  """Half-precision files are read; the parameters are what was asked for."""
  reference = llama_reference(4).to(torch.bfloat16)
  reference.save_pretrained(tmp_path)
  _, wide = hf.load(tmp_path)
  _, narrow = hf.load(tmp_path, param_dtype='bfloat16')
  name = 'model.layers.0.mlp.up_proj.weight'
  theirs = reference.state_dict()[name].float().numpy().T
  np.testing.assert_array_equal(np.asarray(wide['blocks']['mlp']['up']['kernel'][0]), theirs)
  assert wide['blocks']['mlp']['up']['kernel'].dtype == jnp.float32
  assert narrow['blocks']['mlp']['up']['kernel'].dtype == jnp.bfloat16
