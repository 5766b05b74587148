"""BERT and RoBERTa classifiers with one label against transformers: scores, gradients and files.

Three random configurations of each run here, the other 21 with the mark 'slow'.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import trainable

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import families  # Needs transformers.

LENGTH = 13
SEEDS, QUICK_SEEDS = 24, 3
BERT = {
  'family': 'bert',
  'vocab_size': 31,
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 16,
  'initializer_range': 0.3,
  'pad_token_id': 0,
}
ROBERTA = BERT | {'family': 'roberta', 'pad_token_id': 1}


def draw_config(seed):
  """Returns the fields of a random configuration, for both families."""
  draw = np.random.default_rng(seed)
  count = int(draw.integers(1, 5))
  return dict(
    vocab_size=int(draw.integers(17, 60)),
    hidden_size=count * int(draw.integers(2, 8)),
    intermediate_size=int(draw.integers(7, 40)),
    num_hidden_layers=int(draw.integers(1, 4)),
    num_attention_heads=count,
    max_position_embeddings=LENGTH + int(draw.integers(4, 9)),
    type_vocab_size=int(draw.integers(1, 4)),
    hidden_act=families.pick(draw, ['gelu', 'relu', 'gelu_new', 'silu']),
    layer_norm_eps=families.pick(draw, [1e-12, 1e-5]),
    pad_token_id=int(draw.integers(0, 3)),
    num_labels=1,
  )


REFERENCES = {
  'bert': lambda **fields: transformers.BertForSequenceClassification(
    transformers.BertConfig(**fields)
  ),
  'roberta': lambda **fields: transformers.RobertaForSequenceClassification(
    transformers.RobertaConfig(**fields)
  ),
}


def draw_batch(vocab_size, pad, seed):
  """Returns tokens [4, T], right-padded, and their mask."""
  draw = np.random.default_rng(seed)
  tokens = draw.integers(3, vocab_size, (4, LENGTH)).astype(np.int32)
  mask = np.arange(LENGTH)[None] < np.array([LENGTH, 1, 8, 5])[:, None]
  return np.where(mask, tokens, pad).astype(np.int32), mask


def their_scores(reference, tokens, mask):
  """Returns scores [B], a torch tensor."""
  return reference(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits[
    :, 0
  ]


@functools.partial(jax.jit, static_argnames='model')
def score(model, params, tokens, mask):
  """Returns scores [B]."""
  return heads.apply_scalar(params['head'], model.summary(params['backbone'], tokens, mask))


@functools.partial(jax.jit, static_argnames='model')
def evaluate(model, params, tokens, mask):
  """Returns scores, and the gradient of their sum of squares."""

  def loss(params):
    scores = score(model, params, tokens, mask)
    return jnp.sum(jnp.square(scores)), scores

  gradient, scores = jax.grad(loss, has_aux=True)(params)
  return scores, gradient


@dataclasses.dataclass
class Case:
  """A reference, its folder, the model that we read from it, and the results of both on a batch."""

  reference: object
  folder: object
  seed: int

  def __post_init__(self):
    self.reference.set_attn_implementation('eager')
    self.reference.save_pretrained(self.folder / 'theirs')
    self.model, self.params = hf.load_reward(self.folder / 'theirs')
    self.tokens, self.mask = draw_batch(
      self.model.vocab_size, self.reference.config.pad_token_id, self.seed
    )

  @functools.cached_property
  def theirs(self):
    """The reference's scores; also computes the gradients of its parameters."""
    scores = their_scores(self.reference, self.tokens, self.mask)
    scores.square().sum().backward()
    return scores.detach().numpy()

  @functools.cached_property
  def ours(self):
    """Our scores and gradient."""
    return evaluate(self.model, self.params, self.tokens, jnp.asarray(self.mask))


def assert_near(ours, theirs, relative, *, floor=0.0):
  """Asserts that the difference is at most a fraction of the largest number."""
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(relative * np.abs(theirs).max(), floor))


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(
      (family, seed), id=f'{family}-{seed}', marks=() if seed < QUICK_SEEDS else pytest.mark.slow
    )
    for family in REFERENCES
    for seed in range(SEEDS)
  ],
)
def case(request, tmp_path_factory):
  family, seed = request.param
  reference = families.randomize(REFERENCES[family](**draw_config(seed)), seed)
  return Case(reference, tmp_path_factory.mktemp(family), seed)


def test_scores_agree(case):
  assert np.ptp(case.theirs) > 0.01, 'a model without signal tests nothing'
  assert_near(np.asarray(case.ours[0]), case.theirs, 2e-4)


def test_gradients_agree(case):
  """The gradients of all parameters, saved as weights to get transformers' names."""
  case.theirs  # noqa: B018  computes the gradients
  gradient = case.ours[1]
  hf.save(case.folder / 'gradient', case.model, gradient['backbone'], head=gradient['head'])
  ours = transformers.AutoModelForSequenceClassification.from_pretrained(case.folder / 'gradient')
  ours, theirs = dict(ours.named_parameters()), dict(case.reference.named_parameters())
  assert sorted(ours) == sorted(theirs)
  floor = 1e-6 * max(parameter.grad.abs().max().item() for parameter in theirs.values())
  for name, parameter in theirs.items():
    assert_near(ours[name].detach().numpy(), parameter.grad.numpy(), 1e-3, floor=floor)


def test_saved_folder_loads_in_transformers_and_in_ours(case):
  hf.save(
    case.folder / 'ours',
    case.model,
    case.params['backbone'],
    head=case.params['head'],
    max_shard_bytes=1000,
  )
  assert len(list((case.folder / 'ours').glob('*.safetensors'))) > 1
  reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(
    case.folder / 'ours', attn_implementation='eager'
  ).eval()
  assert type(reloaded) is type(case.reference) and reloaded.config.num_labels == 1
  assert_near(their_scores(reloaded, case.tokens, case.mask).detach().numpy(), case.theirs, 1e-5)
  again, params_again = hf.load_reward(case.folder / 'ours')
  assert again == case.model
  jax.tree.map(np.testing.assert_array_equal, params_again, case.params)


@pytest.fixture(scope='module', params=[BERT, ROBERTA], ids=['bert', 'roberta'])
def built(request):
  model = models.create(request.param)
  head = heads.init_scalar(jax.random.key(1), model.width, scale='normal')
  return model, {'backbone': model.init(jax.random.key(0)), 'head': head}


def test_a_score_does_not_depend_on_position_or_padding(built):
  """Padding left, right or between, with invalid ids; empty sequences have a finite score."""
  model, params = built
  text = np.random.default_rng(3).integers(3, 31, 5).astype(np.int32)
  places = [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12], [0, 2, 3, 7, 11], []]
  mask = np.array([np.isin(np.arange(LENGTH), place) for place in places])
  scores = []
  for garbage in (0, -100, 10**6):
    tokens = np.full(mask.shape, garbage, np.int32)
    for row, place in enumerate(places):
      tokens[row, place] = text[: len(place)]
    scores.append(np.asarray(score(model, params, tokens, mask)))
  assert np.isfinite(scores).all()
  np.testing.assert_array_equal(scores, np.broadcast_to(scores[0], (3, 4)))
  np.testing.assert_allclose(scores[0][1:3], scores[0][[0, 0]], rtol=0, atol=1e-5)


def test_positions_begin_after_the_padding_token_in_roberta_only():
  assert models.create(BERT).max_length == 16
  assert models.create(ROBERTA | {'pad_token_id': 3}).max_length == 12


def test_padding_token_of_the_config_stays_if_positions_depend_on_it(built, tmp_path):
  model, params = built

  class Tokenizer:
    pad_token_id, eos_token_id = 7, 2

    def save_pretrained(self, path):
      del path

  hf.save(tmp_path / 'model', model, params['backbone'], head=params['head'], tokenizer=Tokenizer())
  again, _ = hf.load_reward(tmp_path / 'model')
  assert again.config.eos_token_id == 2
  assert again.config.pad_token_id == (1 if model.family == 'roberta' else 7)


def test_remat_and_unroll_change_no_value():
  model, batch = models.create(BERT), draw_batch(31, 0, 0)
  head = {'kernel': np.linspace(-1, 1, model.width), 'bias': np.float32(0)}
  params = {'backbone': model.init(jax.random.key(0)), 'head': head}
  other = dataclasses.replace(model, remat='block', unroll=2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    evaluate(other, params, *batch),
    evaluate(model, params, *batch),
  )


def test_bfloat16_computes_in_bfloat16(built):
  model, params = built
  narrow = dataclasses.replace(model, dtype='bfloat16')
  tokens, mask = draw_batch(31, 0, 0)
  assert jax.eval_shape(narrow.summary, params['backbone'], tokens, mask).dtype == jnp.bfloat16
  expected, found = (np.asarray(score(m, params, tokens, mask)) for m in (model, narrow))
  assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()


def test_adapters_are_read(built):
  """The model with adapters equals the one into which they are merged."""
  model, params = built
  adapted = dataclasses.replace(
    model, lora=lora_lib.Lora(targets=(('query|value', 2, 4.0), ('pooler', 2, 2.0)))
  )
  adapters = lora_lib.init(jax.random.key(1), params['backbone'], adapted.lora)
  draw = np.random.default_rng(0)
  adapters = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)
  both = params | {'backbone': trainable.merge(params['backbone'], adapters)}
  merged = params | {'backbone': lora_lib.merge(params['backbone'], adapters, adapted.lora)}
  batch = draw_batch(31, 0, 0)
  expected, found = score(model, merged, *batch), score(adapted, both, *batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  assert np.abs(expected - score(model, params, *batch)).max() > 0.01


@pytest.mark.parametrize('top', [0, 1, 3])
def test_top_layers_are_read_and_trained(built, top):
  """A split model has the same scores, and gradients of the top blocks and the pooler."""
  model, params = built
  batch = draw_batch(31, 0, 0)
  expected, gradient = evaluate(model, params, *batch)
  trained, frozen = trainable.split_trainable(
    model, jax.tree.map(jnp.copy, params['backbone']), unfrozen_layers=top
  )
  assert set(trained) == {'top', 'pooler'}
  cut = lambda trained: params | {'backbone': trainable.merge(frozen, trained)}
  np.testing.assert_allclose(score(model, cut(trained), *batch), expected, rtol=0, atol=1e-6)
  found = jax.grad(lambda trained: jnp.sum(jnp.square(score(model, cut(trained), *batch))))(trained)
  wanted = gradient['backbone']
  wanted = {
    'top': {'blocks': jax.tree.map(lambda x: x[3 - top :], wanted['blocks'])},
    'pooler': wanted['pooler'],
  }
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_adapters_of_the_top_layers(built):
  """'.*' also matches the pooler, but only the maps of the top blocks get adapters."""
  model, params = built
  adapted = dataclasses.replace(model, lora=lora_lib.Lora(targets=(('.*', 2, 4.0),)))
  adapters, frozen = trainable.split_trainable(
    adapted, jax.tree.map(jnp.copy, params['backbone']), unfrozen_layers=1
  )
  draw = np.random.default_rng(0)
  adapters = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)
  assert set(adapters) == {'top'}
  batch, merged = draw_batch(31, 0, 0), trainable.merge_lora(adapted, adapters, frozen)
  found = score(adapted, params | {'backbone': trainable.merge(frozen, adapters)}, *batch)
  np.testing.assert_allclose(
    found, score(model, params | {'backbone': merged}, *batch), rtol=0, atol=1e-5
  )
  assert np.abs(found - score(model, params, *batch)).max() > 0.01


def test_every_parameter_has_a_place_on_a_mesh(built):
  model, _ = built
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  sharding.shardings(model.shapes(), model.rules, mesh)


@pytest.mark.parametrize(
  'fields,words',
  [
    (BERT | {'is_decoder': True}, 'is_decoder=true'),
    (BERT | {'position_embedding_type': 'relative_key'}, 'position_embedding_type="relative_key"'),
    (BERT | {'num_attention_heads': 5}, 'num_attention_heads=5'),
    (BERT | {'embedding_size': 8}, 'embedding_size=8'),
    (ROBERTA | {'pad_token_id': None}, 'pad_token_id=null'),
    (ROBERTA | {'max_position_embeddings': 2}, 'max_position_embeddings=2'),
  ],
)
def test_config_fields_are_refused_by_name(fields, words):
  with pytest.raises(UserError, match=words):
    models.create(fields)


def test_an_encoder_is_no_language_model(built, tmp_path):
  model, params = built
  hf.save(tmp_path / 'model', model, params['backbone'], head=params['head'])
  with pytest.raises(UserError, match='cannot generate text'):
    hf.load(tmp_path / 'model')


def test_config_of_a_released_checkpoint():
  """The config.json of google-bert/bert-base-uncased and FacebookAI/roberta-base."""
  bert = models.create(
    {
      'architectures': ['BertForMaskedLM'],
      'attention_probs_dropout_prob': 0.1,
      'gradient_checkpointing': False,
      'hidden_act': 'gelu',
      'hidden_dropout_prob': 0.1,
      'hidden_size': 768,
      'initializer_range': 0.02,
      'intermediate_size': 3072,
      'layer_norm_eps': 1e-12,
      'max_position_embeddings': 512,
      'model_type': 'bert',
      'num_attention_heads': 12,
      'num_hidden_layers': 12,
      'pad_token_id': 0,
      'position_embedding_type': 'absolute',
      'transformers_version': '4.6.0.dev0',
      'type_vocab_size': 2,
      'use_cache': True,
      'vocab_size': 30522,
    }
  )
  roberta = models.create(
    {
      'architectures': ['RobertaForMaskedLM'],
      'attention_probs_dropout_prob': 0.1,
      'bos_token_id': 0,
      'eos_token_id': 2,
      'hidden_act': 'gelu',
      'hidden_dropout_prob': 0.1,
      'hidden_size': 768,
      'initializer_range': 0.02,
      'intermediate_size': 3072,
      'layer_norm_eps': 1e-05,
      'max_position_embeddings': 514,
      'model_type': 'roberta',
      'num_attention_heads': 12,
      'num_hidden_layers': 12,
      'pad_token_id': 1,
      'type_vocab_size': 1,
      'vocab_size': 50265,
    }
  )
  for model, parameters in ((bert, 109_482_240), (roberta, 124_645_632)):
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes())) == parameters
    assert model == models.create(model.config.to_hf()) and hash(model) == hash(
      models.create(model.config.to_hf())
    )
    assert model.max_length == 512
