"""BERTScore against the package bert-score and a loop, perplexity against a loop."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import model_metrics
import tiny

# golden/make_bert_score.py made the numbers.
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'bert_score.npz')
ROBERTA = {
  'family': 'roberta',
  'vocab_size': tiny.VOCAB,
  'hidden_size': 8,
  'intermediate_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'max_position_embeddings': 14,
  'initializer_range': 0.3,
  'pad_token_id': 1,
}
GPT2 = {
  'family': 'gpt2',
  'vocab_size': tiny.VOCAB,
  'n_positions': 32,
  'n_embd': 8,
  'n_layer': 2,
  'n_head': 2,
  'initializer_range': 0.3,
}


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  """Returns the folder of the golden BERT."""
  folder = tmp_path_factory.mktemp('bert')
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    (folder / name).write_text(str(GOLDEN[name]))
  tensors = {
    name.removeprefix('tensor/'): GOLDEN[name] for name in GOLDEN if name.startswith('tensor/')
  }
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return str(folder)


def score(name, prompts, responses, references=None, **arguments):
  """Computes the scores of a metric in a run on a mesh of all devices."""
  function = functions.load_reward(f'rlhf_jax.rewards.model_metrics:{name}', arguments=arguments)
  with jax.set_mesh(sharding.make_mesh({'data': -1})):
    return functions.call(
      function,
      prompts,
      responses,
      response_tokens=[[]] * len(responses),
      metadata=[{'completion': one} for one in references or responses],
      response_length=1,
    )


@pytest.mark.parametrize('layer', [1, None])
def test_bert_score_is_that_of_the_package(layer, bert):
  responses, references = (json.loads(str(GOLDEN[n])) for n in ('responses', 'references'))
  found = score('bert_score', responses, responses, references, model=bert, layer=layer)
  expected = GOLDEN['scores'][layer - 1 if layer else -1, :, 2]
  assert np.ptp(expected) > 1e-2
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_empty_text_scores_0(bert):
  responses, references = ['', ' ', 'a cat', 'a cat'], ['a cat', '', '', ' a cat ']
  found = score('bert_score', responses, responses, references, model=bert)
  np.testing.assert_allclose(found, [0, 0, 0, 1], atol=1e-6)


def loop(states, other_states):
  """Computes precision, recall and F1 of states [I, D] and [J, D]."""
  cosine = lambda x, y: float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
  best = lambda xs, ys: np.mean([max(cosine(x, y) for y in ys) for x in xs[1:-1]])
  p, r = best(states, other_states), best(other_states, states)
  return p, r, 2 * p * r / (p + r)


def test_greedy_match_by_a_loop():
  """Garbage in padded positions has no effect."""
  draw = np.random.default_rng(0)
  lengths, others = [3, 5, 7, 4], [6, 3, 4, 6]
  states, other_states = draw.normal(size=(4, 7, 3)), draw.normal(size=(4, 6, 3))
  mask = np.arange(7) < np.array(lengths)[:, None]
  other_mask = np.arange(6) < np.array(others)[:, None]
  found = np.array(model_metrics.greedy_match(states, mask, other_states, other_mask))
  expected = [loop(states[i, : lengths[i]], other_states[i, : others[i]]) for i in range(4)]
  np.testing.assert_allclose(found.T, expected, rtol=0, atol=1e-5)


def test_bert_score_of_a_classifier_by_a_loop(tmp_path):
  """More pairs than a batch, several references, texts longer than the context."""
  model = models.create(ROBERTA)
  params = model.init(jax.random.key(0))
  tokenizer = tiny.write_tokenizer(tmp_path)
  head = heads.init_scalar(jax.random.key(1), model.width, scale='normal')
  hf.save(tmp_path, model, params, tokenizer=tokenizer, head=head)
  draw = np.random.default_rng(0)
  one = lambda: tiny.text(int(draw.integers(60)), int(draw.integers(1, 15)))
  responses = [one() for _ in range(20)]
  references = [[one() for _ in range(draw.integers(1, 4))] for _ in range(20)]
  assert sum(map(len, references)) > model_metrics.BATCH_SIZE

  forward = jax.jit(model.token_states)

  def states(text):
    ids = [tiny.BOS, *(4 + int(word[1:]) for word in text.split())][:11] + [tiny.EOS]
    row = np.array([ids + [0] * (12 - len(ids))], np.int32)
    return np.asarray(forward(params, row, np.arange(12)[None] < len(ids))[0, : len(ids)])

  expected = [
    max(loop(states(r), states(one))[2] for one in g) for r, g in zip(responses, references)
  ]
  found = score('bert_score', responses, responses, references, model=str(tmp_path))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def logprob(model, params, prompt, response):
  """Computes log p(response and EOS | prompt) in one forward pass, and the number of tokens."""
  start = [tiny.BOS, *(4 + int(word[1:]) for word in prompt.split())]
  end = [*(4 + int(word[1:]) for word in response.split()), tiny.EOS]
  count = len(start + end)
  row = np.array([start + end + [0] * (32 - count)], np.int32)
  logits = np.asarray(_logits(model, params, row), np.float64)[0]
  total = 0.0
  for t in range(len(start), count):
    total += logits[t - 1, row[0, t]] - np.log(np.exp(logits[t - 1]).sum())
  return total, len(end)


@functools.partial(jax.jit, static_argnames='model')
def _logits(model, params, row):
  """Computes logits of an unpadded row; the model is causal, so right padding has no effect."""
  place = np.arange(row.shape[1], dtype=np.int32)[None]
  return model.unembed(params, model.forward(params, row, place, np.ones_like(place))[0])


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_perplexity_by_a_loop(family, tmp_path):
  """Up to the context of 32 tokens; one response is empty."""
  tiny.write_model(tmp_path, tiny.LLAMA if family == 'llama' else GPT2)
  model, params = hf.load(tmp_path)
  lengths = [(1, 0), (4, 3), (20, 10), (2, 28), (3, 3)]
  prompts = [tiny.text(i, a) for i, (a, _) in enumerate(lengths)]
  responses = [tiny.text(7 * i, b) for i, (_, b) in enumerate(lengths)]
  pairs = zip(prompts, responses)
  logprobs, counts = np.transpose([logprob(model, params, *pair) for pair in pairs])
  arguments = {'model': str(tmp_path)}
  each = -logprobs / counts
  assert np.ptp(each) > 1e-2
  np.testing.assert_allclose(score('log_perplexity', prompts, responses, **arguments), each, 1e-5)
  found = score('perplexity', prompts, responses, **arguments)
  np.testing.assert_allclose(found, np.exp(each), 1e-5)
  found = score('corpus_perplexity', prompts, responses, **arguments)
  np.testing.assert_allclose(found, [np.exp(-logprobs.sum() / counts.sum())] * 5, 1e-5)


MISTAKES = {
  'a long response': ('perplexity', 'model', {}, 'reads 32 tokens, but .* number 1 have 34'),
  'no language model': ('perplexity', 'reward', {}, 'it is a reward model, not a language model'),
  'no encoder': ('bert_score', 'model', {}, 'a llama model is not an encoder'),
  'no such layer': ('bert_score', 'bert', {'layer': 4}, 'has 3 layers, so there are no first 4'),
  'no layer': ('bert_score', 'bert', {'layer': 0}, 'layer=0 must be a positive whole number'),
  'no folder': ('bert_score', 'none', {}, 'none'),
}


@pytest.mark.parametrize('name, folder, arguments, message', MISTAKES.values(), ids=MISTAKES)
def test_mistakes(name, folder, arguments, message, world, bert):
  arguments['model'] = bert if folder == 'bert' else f'{world}/{folder}'
  with pytest.raises(errors.UserError, match=message):
    score(name, ['w1', tiny.text(0, 20)], ['w2', tiny.text(0, 12)], **arguments)
