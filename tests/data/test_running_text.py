"""Queries from running text, against the loop of lm-human-preferences."""

import json

import numpy as np
import pytest

from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import running_text
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError


def their_query(tokens, length, start_token, end_token):
  """Computes `tf_dataset` of lm-human-preferences without padding; None if it skips a text."""
  if start_token is not None:
    try:
      first_index = tokens.index(start_token) + 1
      if first_index < len(tokens):
        tokens = tokens[first_index:]
    except ValueError:
      return None
  tokens = tokens[:length]
  if end_token is not None:
    try:
      last_index = len(tokens) - tokens[::-1].index(end_token)
      tokens = tokens[:last_index]
    except ValueError:
      return None
  return tokens


def our_queries(texts, tokenizer, **settings):
  """Returns the tokens of each document's query, or None."""
  prompts, report = running_text.queries(texts, tokenizer, **settings)
  assert report.read == len(texts) and report.kept == len(prompts)
  gone = {
    int(place.removeprefix('text ')) for places in report.left_out.values() for place in places
  }
  rows = iter(tokenizers.encode(tokenizer, [prompt.prompt for prompt in prompts]))
  found = [None if number in gone else next(rows).tolist() for number in range(len(texts))]
  assert next(rows, None) is None
  return found, [prompt.prompt for prompt in prompts]


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  """Returns a tokenizer without BOS, like GPT-2's, in which '.' and '..' are two tokens."""
  path = str(tmp_path_factory.mktemp('bpe'))
  tokenizer = tokenizers.train_bpe(['ab abc. abba.. ba. \u2603\u2603'] * 9, 290, path)
  tokenizer.backend_tokenizer.post_processor = tokenizers.hf_tokenizers.processors.Sequence([])
  return tokenizer


@pytest.mark.parametrize(
  'start, end', [('.', '.'), (None, '.'), ('.', None), (None, None), ('ab', '.')]
)
@pytest.mark.parametrize('length', [3, 12, 100])
def test_queries_of_random_words_are_theirs(bpe, start, end, length):
  rng = np.random.default_rng(length)
  words = ['ab', ' ab', ' abc', '.', '.', '..', ' ', ' ba', '\u2603']
  texts = [''.join(rng.choice(words, rng.integers(0, 25))) for _ in range(80)]
  mark = {
    text: int(tokenizers.encode_continuation(bpe, [text])[0][0]) for text in (start, end) if text
  }
  found, queries = our_queries(texts, bpe, length=length, start_text=start, end_text=end)
  assert all(query.endswith(end or '') for query in queries)
  alike = 0
  for text, ours in zip(texts, found):
    tokens = bpe.encode(text)
    theirs = their_query(tokens, length, mark.get(start), mark.get(end))
    if not tokens or (start and theirs and tokens.index(mark[start]) == len(tokens) - 1):
      assert ours is None  # theirs starts at the start of the document
    elif ours is None or theirs is None:
      # If the text of a window has more tokens than the window, there may be no query.
      assert theirs is None or len(bpe.encode(bpe.decode(theirs))) > length
    else:
      assert len(ours) <= length
      text = bpe.decode(theirs)
      assert bpe.decode(ours) == text or len(bpe.encode(text)) > length
      alike += ours == theirs
  assert alike > 8 and all(
    query in text
    for query, text in zip(queries, (text for text, ours in zip(texts, found) if ours is not None))
  )


def test_reasons_are_counted(bpe):
  texts = ['ab ab. ba. ab', 'ab ab', 'ab.', 'ab. ba ba ba ba.', '']
  prompts, report = running_text.queries(texts, bpe, length=3, start_text='.', end_text='.')
  assert prompts == [formats.Prompt(' ba.', {})]
  assert report.left_out == {
    running_text.NO_START: ('text 1', 'text 2', 'text 4'),
    running_text.NO_END: ('text 3',),
  }
  with pytest.raises(UserError, match='no text gives a query of 3 tokens: 0 of 1 records kept'):
    running_text.queries(['ab'], bpe, length=3, start_text='.', end_text=None)
  with pytest.raises(UserError, match="end_text '' has no tokens"):
    running_text.queries(texts, bpe, length=3, start_text='.', end_text='')


def test_texts_of_several_tokens_and_characters_cut_in_two(bpe):
  assert len(tokenizers.encode_continuation(bpe, ['POST:'])[0]) == 5
  prompts, _ = running_text.queries(
    ['TITLE: a POST: ab abPOST: ba. END abEND'], bpe, length=30, start_text='POST:', end_text='END'
  )
  assert prompts[0].prompt == ' ab abPOST: ba. END abEND'
  text = '\u2604\u2604\u2604'
  size = len(bpe.encode('\u2604'))
  assert size > 1
  for length in range(size, 3 * size + 1):
    prompts, _ = running_text.queries([text], bpe, length=length, start_text=None, end_text=None)
    assert prompts[0].prompt == '\u2604' * (length // size)


def test_prompts_fit_the_iterator_with_a_bos_too(tmp_path):
  tokenizer = tokenizers.train_bpe(['ab abc. abba ba.'] * 9, 280, str(tmp_path))
  texts = ['ab. abc ab ba. ab abba. ab', 'ba. ab ab ab ab ab ab']
  prompts, _ = running_text.queries(texts, tokenizer, length=6, start_text='.', end_text=None)
  iterator, count = pipelines.prompt_iterator(
    prompts, tokenizer, batch_size=2, max_prompt_length=6, seed=0
  )
  batch, _ = next(iterator)
  assert count == 2 and batch.mask.all() and (batch.tokens[:, 0] == tokenizer.bos_token_id).all()


def test_a_stage_writes_prompts_and_held_out_ones(tmp_path):
  texts = [f'x. {word}. y' for word in ('ab', 'ba', 'abba', 'ab')] + ['nothing']
  data = tmp_path / 'texts.jsonl'
  data.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  tokenizers.train_bpe(texts, 270, str(tmp_path / 'tokenizer'))
  settings = dict(
    path=str(data),
    tokenizer=str(tmp_path / 'tokenizer'),
    length=9,
    start_text='.',
    end_text='.',
    prefix='Q:',
    suffix='\n\nTL;DR:',
  )
  running_text.write(tmp_path, held_out=1, **settings)
  held_out, prompts = (
    [json.loads(line)['prompt'] for line in (tmp_path / name).read_text().splitlines()]
    for name in ('held_out.jsonl', 'prompts.jsonl')
  )
  assert held_out == ['Q: ab.\n\nTL;DR:']
  assert prompts == ['Q: ba.\n\nTL;DR:', 'Q: abba.\n\nTL;DR:']
  with pytest.raises(UserError, match='all 4 queries are held out'):
    running_text.write(tmp_path, held_out=3, **settings)


def test_gpt2_on_stories(shared):
  """Queries of 64 tokens that start after and end with '.', as in the paper's books task."""
  tokenizer = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  texts = (shared / 'data/text/tinystories_sample.txt').read_text().split('<|endoftext|>')[:2000]
  lines = (shared / 'data/text/c4_demo.jsonl').read_text().splitlines()[:2000]
  texts += [json.loads(line)['text'] for line in lines]
  found, _ = our_queries(texts, tokenizer, length=64, start_text='.', end_text='.')
  theirs = [their_query(tokenizer.encode(text), 64, 13, 13) for text in texts]
  assert found == theirs and 250 < sum(query is not None for query in found)
