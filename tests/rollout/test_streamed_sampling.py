"""Requests that come and go against `TextPolicy.sample` of each prompt alone, token for token."""

import collections

import jax
import loops
import numpy as np
import pytest
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import errors
from rlhf_jax import models
from rlhf_jax import policy as policy_lib
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
from rlhf_jax.rewards import learned
from rlhf_jax.rollout import detokenizer
from rlhf_jax.rollout import streaming
import tiny

LONG = tiny.LLAMA | {'max_position_embeddings': 64, 'initializer_range': 0.4}


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
  """A policy with a context of 64 tokens, whose prompts are padded to 32 or 64."""
  path = tmp_path_factory.mktemp('long')
  model = models.create(LONG)
  hf.save(path, model, model.init(jax.random.key(3)), tokenizer=tiny.write_tokenizer(path))
  return policy_lib.TextPolicy.load(path)


def streams(policy, **settings):
  return streaming.Streams(policy.model, policy.params, policy.tokenizer, rows=3, **settings)


def run(server, arrivals):
  """Submits requests before given steps, and steps until all are finished.

  Args:
    server: Streams.
    arrivals: {step: list of keyword arguments of `submit`}.

  Returns:
    (requests in the order of `arrivals`, {request: its pieces}, {request: its last step}).
  """
  requests, pieces, ends, step = [], collections.defaultdict(list), {}, 0
  while server.busy or any(at >= step for at in arrivals):
    requests += [server.submit(**request) for request in arrivals.get(step, ())]
    for request, piece in server.step():
      pieces[request].append(piece)
      if request.finish:
        ends[request] = step
    step += 1
  return requests, pieces, ends


# Prompt and longest response; the second prompt is padded to 64 tokens. Only two shapes, because
# each compiles a program of `TextPolicy.sample`.
SHAPES = {5: 56, 44: 15}
LIMITS = (56, 1, 40, 9, 15, 33, 56, 2)


def asked(count, start=0):
  """Returns arguments of `submit`: greedy ones and sampled ones in turn."""
  requests = []
  for i in range(start, start + count):
    length = (5, 44, 5)[i % 3]
    settings = {'temperature': 0.0, 'seed': 0} if i % 2 else {'temperature': 0.8, 'seed': 11 * i}
    limit = min(LIMITS[i % 8], SHAPES[length])
    requests.append({'prompt': tiny.text(7 * i, length), 'max_new_tokens': limit} | settings)
  return requests


def test_tokens_are_those_of_the_prompt_alone(policy, compiled):
  """24 requests in 3 rows, greedy and sampled ones side by side, arriving before, after and during
  others; the cache moves to the left many times. Each prompt length is compiled once."""
  arrivals = {0: asked(2), 1: asked(7, 2), 6: asked(1, 9), 7: asked(2, 10), 30: asked(12, 12)}
  server, before = streams(policy), len(compiled)
  requests, pieces, ends = run(server, arrivals)
  assert server.settings.buckets == [32, 64]
  programs = collections.Counter(compiled[before:])
  assert programs['jit(join)'] == 2 and programs['jit(decode)'] == 1
  longest = 0
  for request, settings in zip(requests, asked(24), strict=True):
    limit = settings.pop('max_new_tokens')
    prompt, seed = settings['prompt'], settings['seed']
    alone = policy.sample(
      [prompt],
      seed,
      max_new_tokens=SHAPES[len(prompt.split())],
      temperature=settings['temperature'],
    )
    expected = alone.response_tokens[0][:limit]
    assert request.text.tokens == expected
    text = policy.tokenizer.decode(expected, skip_special_tokens=True)
    assert ''.join(pieces[request]) == request.text.text == text
    assert request.finish == ('end' if expected[-1] == tiny.EOS else 'length')
    longest = max(longest, len(request.prompt) + len(expected))
  assert longest > 55 and len(set(ends.values())) > 8


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gemma2', 't5'])
def test_sliding_windows_and_encoders(name, tmp_path):
  """An encoder has states of its own beside the cache, and slots for the response alone."""
  model, params = loops.family(name)
  tokenizer = tiny.write_tokenizer(tmp_path, words=loops.VOCAB - 4)
  tokenizers.fit(tokenizer, model)
  server = streaming.Streams(model, params, tokenizer, rows=2, max_length=40, top_k=9, top_p=0.9)
  texts = [' '.join(f'w{(5 * i + j) % 20}' for j in range(1 + 3 * i)) for i in range(4)]
  requests = []
  for i, text in enumerate(texts):
    requests.append(server.submit(text, max_new_tokens=20, temperature=0.9, seed=i))
    server.step()
  while server.busy:
    server.step()
  sampling = loops.sampling(20, temperature=0.9, top_k=9, top_p=0.9, eos_id=tiny.EOS)
  for i, ids in enumerate(tokenizers.encode(tokenizer, texts)):
    prompt = learned.left_padded([ids], 16, tiny.PAD)
    alone = loops.plain(params, prompt, jax.random.key(i), model, sampling)
    expected = np.asarray(alone.tokens[0, 16:])[np.asarray(alone.response_mask[0])]
    assert requests[i].text.tokens == expected.tolist()


def test_cancelled_requests_free_their_rows(policy):
  server = streams(policy)
  requests = [
    server.submit('w1', max_new_tokens=40, temperature=0.8 * (i > 3), seed=11) for i in range(6)
  ]
  first, waiting, last = requests[0], requests[3], requests[5]
  server.step()
  server.cancel(first)  # in its row
  server.cancel(waiting)
  cut, returned = len(first.text.tokens), set()
  while server.busy:
    returned |= {request for request, _ in server.step()}
  assert first.finish == waiting.finish == 'cancelled' and not returned & {first, waiting}
  assert 0 < len(first.text.tokens) == cut < 40 and not waiting.text.tokens
  assert last in returned and last.text.tokens == requests[4].text.tokens


@pytest.mark.parametrize(
  'settings, message',
  [
    (
      {'prompt': tiny.text(0, 60), 'max_new_tokens': 4},
      'has 61 tokens; with 4 new .* context of 64',
    ),
    ({'prompt': tiny.text(0, 64)}, 'has 65 tokens'),
    ({'prompt': 'w1', 'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'prompt': 'w1', 'temperature': -0.5}, 'temperature=-0.5'),
    ({'prompt': 'w1', 'seed': 2**31}, 'seed=2147483648'),
  ],
)
def test_requests_that_cannot_be_served(policy, settings, message):
  server = streams(policy)
  with pytest.raises(errors.UserError, match=message):
    server.submit(**settings)
  assert not server.busy


def pieces_of(tokenizer, ids, stop=()):
  """Returns the pieces of a response whose tokens arrive one by one, and its Detokenizer."""
  text = detokenizer.Detokenizer(tokenizer, stop)
  pieces = []
  for token in ids:
    pieces.append(text.push([token]))
    if text.stopped:
      break
  return [*pieces, text.finish()], text


@pytest.fixture(scope='module')
def byte_tokenizer(tmp_path_factory):
  """A byte-level tokenizer without merges: every token is one byte."""
  return tokenizers.train_bpe([''], 259, tmp_path_factory.mktemp('bytes'))


def test_pieces_never_split_a_character(byte_tokenizer):
  text = 'aé 你😀\n'
  ids = tokenizers.encode_continuation(byte_tokenizer, [text])[0].tolist()
  assert len(ids) == len(text.encode())
  pieces, _ = pieces_of(byte_tokenizer, ids)
  assert [piece for piece in pieces if piece] == list(text)


def test_incomplete_characters_become_replacement_characters_at_the_end(byte_tokenizer):
  ids = tokenizers.encode_continuation(byte_tokenizer, ['a😀b'])[0].tolist()
  pieces, text = pieces_of(byte_tokenizer, ids[:3])  # 'a' and two of four bytes
  assert pieces == ['a', '', '', '\ufffd'] and text.text == 'a\ufffd'
  pieces, _ = pieces_of(byte_tokenizer, ids[:3] + ids[-1:])  # the rest never arrives
  assert pieces == ['a', '', '', '\ufffdb', '']


def test_bytes_of_a_tokenizer_that_falls_back_to_them():
  """Its decoder replaces a whole run of bytes if one character of it is broken."""
  vocabulary = {'<unk>': 0, '▁a': 1} | {f'<0x{byte:02X}>': 2 + byte for byte in range(256)}
  backend = hf_tokenizers.Tokenizer(
    hf_tokenizers.models.BPE(vocabulary, [], unk_token='<unk>', byte_fallback=True)
  )
  parts = [
    hf_tokenizers.decoders.Replace('▁', ' '),
    hf_tokenizers.decoders.ByteFallback(),
    hf_tokenizers.decoders.Fuse(),
  ]
  backend.decoder = hf_tokenizers.decoders.Sequence(parts)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>')
  ids = [1, *(2 + byte for byte in 'é你'.encode())]
  assert pieces_of(tokenizer, ids)[0] == [' a', '', 'é', '', '', '你', '']
  assert pieces_of(tokenizer, ids[:-1])[0] == [' a', '', 'é', '', '', '\ufffd\ufffd']
  # What comes after a broken character is streamed, and a stop string in it ends the response.
  ids = [*ids[:3], ids[1], 1, *ids[1:3], ids[1], 1, 1]
  pieces, text = pieces_of(tokenizer, ids, (' a a',))
  assert ''.join(pieces) == text.text == ' aé\ufffd aé\ufffd' and text.stopped
  assert pieces[:5] == ['', '', ' aé', '', '\ufffd'] and text.tokens == ids


def test_stop_strings_are_held_back_and_removed(byte_tokenizer):
  encode = lambda text: tokenizers.encode_continuation(byte_tokenizer, [text])[0].tolist()
  stop = ('\n\nHuman:', 'END')
  pieces, text = pieces_of(byte_tokenizer, encode('Hi\nE\n\nHuman: and more'), stop)
  assert ''.join(pieces) == text.text == 'Hi\nE' and text.stopped
  assert text.tokens == encode('Hi\nE\n\nHuman:')
  assert pieces[:5] == ['H', 'i', '', '\n', 'E'] or pieces[:5] == ['H', 'i', '', '\n', '']
  pieces, text = pieces_of(byte_tokenizer, encode('ENx EN'), stop)
  assert pieces == ['', '', 'ENx', ' ', '', '', 'EN'] and not text.stopped
  with pytest.raises(errors.UserError, match='stop string is empty'):
    detokenizer.Detokenizer(byte_tokenizer, ('',))


def test_stop_strings_end_a_stream(policy):
  expected = policy.sample(['w1'], max_new_tokens=56, temperature=0.0).responses[0].split()
  stop = f'{expected[3]} {expected[4]}'  # two tokens
  server = streams(policy, stop=(stop,))
  request = server.submit('w1', max_new_tokens=56, temperature=0.0)
  while server.busy:
    server.step()
  assert request.finish == 'end' and request.text.text == ' '.join(expected[:3]) + ' '
  assert len(request.text.tokens) == 5
