"""Scores of reward models: on the rollout's tokens, or on texts in another tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import tokenizers
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import learned
from rlhf_jax.rewards import scorers
from rlhf_jax.rewards import scoring
import tiny

TEXTS = [('w1 w2', 'w3'), ('w4', 'w5 w6 w7'), ('w8 w9 w10', 'w11 w12'), ('w13', '')]
ENDED = [True, False, True, True]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh({}, devices=jax.devices()[:1])


def ids(text):
  return [4 + int(word[1:]) for word in text.split()]


def load(path, world, mesh):
  """Returns the scorer of a reward model for the tiny world's policy, and the start of a critic."""
  return scorers.model_scorer(
    str(path),
    tokenizers.load(world / 'tokenizer'),
    mesh,
    max_length=None,
    load={},
    check=lambda model: None,
    of_heads=None,
  )


def test_both_give_the_same_score(world, mesh):
  """A left-padded rollout and the same right-padded texts."""
  model, params = hf.load_reward(world / 'reward', mesh=mesh)
  tokenizer = tokenizers.load(world / 'reward')
  tokens, mask = np.full((4, 9), tiny.PAD, np.int32), np.zeros((4, 9), bool)
  for row, ((prompt, response), end) in enumerate(zip(TEXTS, ENDED)):
    first, rest = [tiny.BOS, *ids(prompt)], ids(response) + [tiny.EOS] * end
    tokens[row, 4 - len(first) : 4 + len(rest)] = first + rest
    mask[row, 4 - len(first) : 4 + len(rest)] = True
  rollout = types.Rollout(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(mask[:, 4:]), None)
  on_tokens = learned.of_tokens(model, params)(rollout)
  on_texts = learned.of_texts(model, params, tokenizer, max_length=12, mesh=mesh)(
    *zip(*TEXTS), ENDED
  )
  np.testing.assert_allclose(on_texts, on_tokens, rtol=0, atol=1e-5)
  assert np.ptp(on_texts) > 0.01


def test_texts_beyond_its_context_are_refused(world, mesh):
  model, params = hf.load_reward(world / 'reward', mesh=mesh)
  tokenizer = tokenizers.load(world / 'reward')
  score = learned.of_texts(model, params, tokenizer, max_length=5, mesh=mesh)
  with pytest.raises(
    errors.UserError, match=(r'reads 5 tokens, but .* number 2 have 7 .*max_length')
  ):
    score(*zip(*TEXTS), ENDED)


def test_which_tokenizers_are_the_same(world, tmp_path):
  ours = tokenizers.load(world / 'tokenizer')
  assert learned.same_tokenizer(ours, tokenizers.load(world / 'reward'))
  assert not learned.same_tokenizer(ours, tiny.write_tokenizer(tmp_path / 'more', words=61))


def changed(folder, change):
  """Returns the tiny world's tokenizer with its state changed by `change`."""
  made = tiny.write_tokenizer(folder)
  state = json.loads(made.backend_tokenizer.to_str())
  change(state)
  (folder / 'tokenizer.json').write_text(json.dumps(state))
  return tokenizers.load(folder)


@pytest.mark.parametrize(
  'same, change',
  [
    (True, {'decoder': {'type': 'Fuse'}}),
    (True, {'truncation': None}),
    (False, {'post_processor': None}),
    (False, {'normalizer': {'type': 'Lowercase'}}),
    (False, {'normalizer': {'type': 'Strip', 'strip_left': True, 'strip_right': True}}),
    (False, {'pre_tokenizer': {'type': 'Whitespace'}}),
  ],
  ids=['decoder', 'nothing', 'no BOS', 'lower-case', 'strip', 'pre-tokenizer'],
)
def test_tokenizers_that_hold_the_same_do_not_always_do_the_same(same, change, world, tmp_path):
  ours, other = (
    tokenizers.load(world / 'tokenizer'),
    changed(tmp_path, lambda state: state.update(change)),
  )
  assert other.get_vocab() == ours.get_vocab()  # the vocabularies alone are equal
  assert learned.same_tokenizer(other, ours) == learned.same_tokenizer(ours, other) == same


def test_added_tokens_count_if_ids_depend_on_them(world, tmp_path):
  """A token that includes the space before it changes ids; another padding token does not."""
  ours = tokenizers.load(world / 'tokenizer')

  def strip(state):
    state['added_tokens'][2]['lstrip'] = True

  assert not learned.same_tokenizer(changed(tmp_path / 'strip', strip), ours)
  padded = tokenizers.load(world / 'tokenizer')
  padded.add_special_tokens({'pad_token': '<|other pad|>'})
  assert padded.pad_token_id == tiny.VOCAB and learned.same_tokenizer(padded, ours)
  padded.add_tokens(['w1 w2'])
  assert not learned.same_tokenizer(padded, ours)


T5 = {
  'family': 't5',
  'vocab_size': tiny.VOCAB,
  'd_model': 12,
  'd_kv': 4,
  'd_ff': 16,
  'num_layers': 1,
  'num_decoder_layers': 1,
  'num_heads': 2,
  'relative_attention_num_buckets': 6,
  'relative_attention_max_distance': 5,
  'pad_token_id': tiny.PAD,
  'eos_token_id': tiny.EOS,
}


@pytest.mark.parametrize('family', ['t5', 'llama'])
def test_a_reward_model_reads_the_rows_that_it_learned_from(family, world, tmp_path, mesh):
  """An encoder-decoder's prompts end with EOS for any policy; a decoder's do not."""
  model = models.create(T5 if family == 't5' else tiny.LLAMA)
  own, theirs = tiny.write_tokenizer(tmp_path), tokenizers.load(world / 'tokenizer')
  params = {
    'backbone': model.init(jax.random.key(5)),
    'head': heads.init_scalar(jax.random.key(6), model.width, scale='normal'),
  }
  hf.save(tmp_path, model, params['backbone'], tokenizer=own, head=params['head'])
  tokenizers.fit(own, model)
  if family == 'llama':
    tokenizers.set_encoder_decoder(theirs)  # as for an encoder-decoder as the policy
  score, start = scorers.model_scorer(
    str(tmp_path), theirs, mesh, max_length=16, load={}, check=lambda model: None, of_heads=None
  )
  assert start is None

  prompts, responses = zip(*TEXTS[:3])
  first, rest = (
    tokenizers.encode(theirs, prompts),
    tokenizers.encode_continuation(theirs, responses),
  )
  tokens, mask = np.full((3, 10), tiny.PAD, np.int32), np.zeros((3, 10), bool)
  for i, row in enumerate(rest):
    row = [*first[i], *row, tiny.EOS]
    here = slice(6 - len(first[i]), 6 - len(first[i]) + len(row))
    tokens[i, here], mask[i, here] = row, True
  rollout = types.Rollout(tokens, mask, mask[:, 6:], np.zeros((3, 4), np.float32))
  found = score(sharding.put_rows(rollout, mesh), [formats.Prompt(p, {}) for p in prompts])

  ((learned_from, _),) = pipelines.comparison_batches(
    [formats.Comparison(p, (r,), (0,)) for p, r in zip(prompts, responses)],
    own,
    batch_size=3,
    max_length=16,
  )
  assert list(learned_from.tokens[0, 0][learned_from.mask[0, 0]]).count(tiny.EOS) == 1 + (
    family == 't5'
  )
  expect = jax.jit(lambda tokens, mask: scoring.score(params, tokens, mask, model=model))
  np.testing.assert_allclose(
    found, expect(learned_from.tokens[:, 0], learned_from.mask[:, 0]), rtol=0, atol=1e-5
  )
  paid = expect(jnp.asarray(tokens), jnp.asarray(mask))
  assert np.abs(paid - found).max() > 0.02, 'the tokens of the policy would score otherwise'


def test_another_tokenizer_reads_the_text(world, tmp_path, mesh):
  """Policy and reward model have different tokenizers, so token ids cannot be shared."""
  own = tokenizers.train_bpe([' '.join(pair) for pair in TEXTS], 270, tmp_path / 'reward')
  model = models.create(tiny.LLAMA | {'vocab_size': 270, 'max_position_embeddings': 48})
  params = {
    'backbone': model.init(jax.random.key(5)),
    'head': heads.init_scalar(jax.random.key(6), model.width, scale='normal'),
  }
  hf.save(tmp_path / 'reward', model, params['backbone'], tokenizer=own, head=params['head'])
  score, critic = load(tmp_path / 'reward', world, mesh)
  assert critic is None  # a critic needs a model with the policy's tokens

  tokens, mask = np.full((4, 9), tiny.PAD, np.int32), np.zeros((4, 9), bool)
  for row, ((prompt, response), end) in enumerate(zip(TEXTS, ENDED)):
    first, rest = [tiny.BOS, *ids(prompt)], ids(response) + [tiny.EOS] * end
    tokens[row, 4 - len(first) : 4 + len(rest)] = first + rest
    mask[row, 4 - len(first) : 4 + len(rest)] = True
  rollout = types.Rollout(tokens, mask, mask[:, 4:], np.zeros((4, 5), np.float32))
  found = score(sharding.put_rows(rollout, mesh), [formats.Prompt(p, {}) for p, _ in TEXTS])

  expect = jax.jit(lambda *row: scoring.score(params, *row, model=model))
  for i, ((prompt, response), end) in enumerate(zip(TEXTS, ENDED)):
    row = (
      own.encode(prompt, add_special_tokens=True)
      + own.encode(response, add_special_tokens=False)
      + [own.eos_token_id] * end
    )
    padded = jnp.asarray([row + [own.pad_token_id] * (48 - len(row))])
    expected = expect(padded, jnp.arange(48)[None] < len(row))
    assert float(found[i]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_a_bert_classifier_reads_prompt_and_response_as_one_text(world, tmp_path, mesh):
  """A transformers folder with word pieces gives its logits, whether or not a response ended."""
  torch = pytest.importorskip('torch')
  words = [f'w{i}' for i in range(60)]
  vocabulary = {word: i for i, word in enumerate(['[PAD]', '[CLS]', '[SEP]', '[UNK]', *words])}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.post_processor = hf_tokenizers.processors.BertProcessing(('[SEP]', 2), ('[CLS]', 1))
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token='[PAD]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    unk_token='[UNK]',
  )
  theirs.save_pretrained(tmp_path)
  torch.manual_seed(0)
  bert = transformers.BertForSequenceClassification(
    transformers.BertConfig(
      vocab_size=64,
      hidden_size=12,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=20,
      max_position_embeddings=32,
      num_labels=1,
      initializer_range=0.5,
    )
  ).eval()
  bert.save_pretrained(tmp_path)
  score, critic = load(tmp_path, world, mesh)
  assert critic is None
  tokens = np.array([[tiny.BOS, 10, 11, 12, tiny.EOS], [tiny.BOS, 20, 21, 22, 23]], np.int32)
  mask = np.ones(tokens.shape, bool)
  rollout = types.Rollout(tokens, mask, mask[:, 2:], np.zeros((2, 3), np.float32))
  prompts = ['w6 ', 'w16 ']
  found = score(sharding.put_rows(rollout, mesh), [formats.Prompt(p, {}) for p in prompts])
  texts = ['w6 w7 w8', 'w16 w17 w18 w19']
  with torch.no_grad():
    expected = bert(**theirs(texts, padding=True, return_tensors='pt')).logits[:, 0].numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  assert abs(expected[0] - expected[1]) > 1e-3
