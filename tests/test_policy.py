"""TextPolicy: batches, log-probabilities, errors, and the command line."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tokenizers import processors

from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax.models import hf
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = [tiny.text(i, 1 + i % 3) for i in range(7)]


@pytest.fixture(scope='module')
def policy(world):
  return policy_lib.TextPolicy.load(world / 'model')


def sample(policy, prompts=PROMPTS, **changes):
  settings = {'max_new_tokens': 5, 'temperature': 0.0} | changes
  return policy.sample(prompts, jax.random.key(0), **settings)


def same(a, b):
  assert (a.prompts, a.responses) == (b.prompts, b.responses)
  jax.tree.map(np.testing.assert_array_equal, a.rollout, b.rollout)


def test_texts_are_those_of_the_tokens(policy):
  found = sample(policy, temperature=1.0)
  assert found.prompts == PROMPTS
  for prompt, response, tokens, mask, real in zip(
    PROMPTS,
    found.responses,
    found.rollout.tokens,
    found.rollout.mask,
    found.rollout.response_mask,
    strict=True,
  ):
    row = tokens[mask].tolist()
    assert row[: len(row) - real.sum()] == [tiny.BOS] + [4 + int(w[1:]) for w in prompt.split()]
    words = [f'w{t - 4}' for t in row[len(row) - real.sum() :] if t >= 4]
    assert response.split() == words


def test_batches_with_a_remainder_are_like_one_batch(policy, monkeypatch):
  whole = sample(policy, temperature=0.0)
  logprobs = policy.rollout_logprobs(whole.rollout, temperature=0.8)
  monkeypatch.setattr(policy_lib, 'BATCH_SIZE', 3)
  same(sample(policy, temperature=0.0), whole)
  np.testing.assert_allclose(
    policy.rollout_logprobs(whole.rollout, temperature=0.8), logprobs, atol=1e-5
  )
  one = sample(policy, ['w1'] * 7, temperature=1.0, ignore_eos=True)
  assert len({tuple(row) for row in one.rollout.tokens.tolist()}) == 7  # each batch has its own key


@pytest.mark.parametrize('count, batch', [(7, 3), (6, 3), (2, 3), (1, 1)])
def test_in_batches(count, batch, monkeypatch):
  monkeypatch.setattr(policy_lib, 'BATCH_SIZE', batch)
  seen = []
  tree = {'a': np.arange(count), 'b': np.arange(3 * count).reshape(count, 3)}
  found = policy_lib.in_batches(
    lambda rows, start: (seen.append((start, len(rows['a']))), {k: v + 1 for k, v in rows.items()})[
      1
    ],
    tree,
  )
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), found, tree)
  assert seen == [(s, min(batch, count)) for s in range(0, count, batch)]  # one shape for all


def test_logprobs_are_summed_over_the_response(policy):
  found = sample(policy, temperature=0.7)
  np.testing.assert_allclose(
    policy.rollout_logprobs(found.rollout, temperature=0.7),
    found.rollout.logprobs.sum(axis=1),
    atol=1e-5,
  )


def test_the_length_that_prompts_are_padded_to_changes_no_response(policy):
  found, padded = sample(policy, temperature=1.0), sample(policy, temperature=1.0, prompt_length=9)
  assert padded.responses == found.responses
  assert (padded.rollout.tokens.shape[1], found.rollout.tokens.shape[1]) == (9 + 5, 4 + 5)
  same(sample(policy, temperature=1.0, prompt_length=2), found)  # shorter than the longest prompt


def test_stop_strings_end_responses_and_stay_in_them(policy):
  """Against responses without stops: one token ('w7'), part of a word ('2'), several words."""
  free = sample(policy, temperature=1.0, max_new_tokens=12, ignore_eos=True)
  for stop in (['w7'], ['2'], ['w1', 'w4 ', 'w33 w']):
    found = sample(policy, temperature=1.0, max_new_tokens=12, ignore_eos=True, stop=stop)
    for whole, text in zip(free.responses, found.responses, strict=True):
      words = whole.split(' ')
      ends = [n for n in range(1, len(words) + 1) if any(s in ' '.join(words[:n]) for s in stop)]
      assert text == ' '.join(words[: ends[0]] if ends else words)
    assert found.responses != free.responses
  with pytest.raises(errors.UserError, match='a stop string is empty'):
    sample(policy, stop=[''])


def test_a_token_ends_responses_in_place_of_the_eos(policy):
  whole = sample(policy, temperature=1.0, max_new_tokens=12, ignore_eos=True)
  word = policy.tokenizer.decode([whole.rollout.tokens[0, -4]])
  token = policy.tokenizer.convert_tokens_to_ids(word)
  found = sample(policy, temperature=1.0, max_new_tokens=12, truncate_at=word, truncate_after=3)
  for row, real, theirs, ended in zip(
    found.rollout.tokens[:, -12:],
    found.rollout.response_mask,
    whole.rollout.tokens[:, -12:],
    found.rollout.ended,
    strict=True,
  ):
    places = [i for i in range(3, 12) if theirs[i] == token]
    length = places[0] + 1 if places else 12
    assert ended == bool(places) and real.tolist() == [True] * length + [False] * (12 - length)
    assert row[:length].tolist() == theirs[:length].tolist()
  assert found.rollout.ended[0]
  with pytest.raises(errors.UserError, match="truncate_at='w1 w2' must be one token"):
    sample(policy, truncate_at='w1 w2')


def test_tokens_before_which_nothing_ends(policy):
  found = sample(policy, temperature=1.0, max_new_tokens=12, stop=['w', 'w5'], min_new_tokens=4)
  np.testing.assert_array_equal(found.rollout.response_mask.sum(axis=1), 5)  # every word has a w
  assert not (found.rollout.tokens[:, -12:-8] == tiny.EOS).any()


def test_take_keeps_texts_and_tokens_together(policy):
  found = sample(policy)
  some = found.take([4, 1])
  assert some.responses == [found.responses[4], found.responses[1]]
  assert some.prompts == [PROMPTS[4], PROMPTS[1]]
  np.testing.assert_array_equal(some.rollout.tokens, found.rollout.tokens[[4, 1]])


def test_a_prompt_and_response_beyond_the_context(policy):
  sample(policy, [tiny.text(0, 26)])  # 27 + 5 of 32
  with pytest.raises(errors.UserError, match='28 tokens and 5 new ones exceed.* of 32 tokens'):
    sample(policy, ['w1', tiny.text(0, 27)])


def test_an_empty_prompt_begins_with_the_bos(policy, world, tmp_path):
  found = sample(policy, [''])
  assert found.rollout.tokens[0, 0] == tiny.BOS and found.rollout.mask[0, 0]
  # Without a BOS there is no first token.
  shutil.copytree(world / 'model', tmp_path / 'model')
  policy = policy_lib.TextPolicy.load(tmp_path / 'model')
  policy.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
  with pytest.raises(errors.UserError, match='a prompt is empty'):
    sample(policy, [''])


def test_load_takes_the_model_of_a_finished_run(policy, world, tmp_path):
  shutil.copytree(world / 'model', tmp_path / 'model')
  same(sample(policy_lib.TextPolicy.load(tmp_path)), sample(policy))
  with pytest.raises(errors.UserError):
    policy_lib.TextPolicy.load(tmp_path / 'nothing')


def test_by_default_responses_fill_the_context(policy):
  found = sample(policy, PROMPTS[:2], max_new_tokens=None, ignore_eos=True)
  assert found.rollout.tokens.shape[1] == policy.model.max_length < policy_lib.DEFAULT_NEW_TOKENS


def test_a_prompt_that_cannot_be_read_is_named_without_a_config(policy, tmp_path):
  (tmp_path / 'prompts.jsonl').write_text('{"prompt": "w1"}\n{"prompt": \n')
  with pytest.raises(errors.DataError, match=r'jsonl:2: not valid JSON \(.*column 11\)') as found:
    policy.read_prompts(tmp_path / 'prompts.jsonl')
  assert 'config.' not in str(found.value)


def test_command_line(policy, tmp_path):
  hf.save(tmp_path / 'saved', policy.model, policy.params, tokenizer=policy.tokenizer)
  found = subprocess.run(
    [
      sys.executable,
      '-m',
      'rlhf_jax.generate',
      f'--model={tmp_path / "saved"}',
      '--prompt=w1 w2',
      '--prompt=w3',
      '--num_samples=2',
      '--temperature=0',
      '--max_new_tokens=5',
    ],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
    text=True,
    capture_output=True,
    timeout=300,
  )
  assert found.returncode == 0, found.stderr
  prompts = ['w1 w2', 'w1 w2', 'w3', 'w3']
  expected = [p + r for p, r in zip(prompts, sample(policy, prompts).responses, strict=True)]
  assert found.stdout == '\n---\n'.join(expected) + '\n'
