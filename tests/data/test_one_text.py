"""Every stage reads the same prompt: 500 random records of all shapes, against transformers.

The expected tokens of messages are those of transformers' apply_chat_template; of texts, those of
the tokenizer; of a completion, those of its text alone, with an EOS.
"""

import json
import random

from absl import flags
from absl.testing import flagsaver
import jax
import numpy as np
import pytest

from rlhf_jax import config as config_lib
from rlhf_jax import generate
from rlhf_jax import models
from rlhf_jax import policy as policy_lib
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax.data import formats
from rlhf_jax.data import pipelines
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import evaluators
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation import reward_models
from rlhf_jax.feedback import collect
from rlhf_jax.models import hf
import tiny

RECORDS = 500
LENGTH = 256  # tokens, more than any prompt and completion have
# Writes the BOS, as Llama's does, and a line break after the EOS of a reply.
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)
TURN = '\n\nHuman: {}\n\nAssistant:'
# Most merge with the text before or after them.
PIECES = (
  'up',
  'on',
  ' upon',
  ' a',
  'time',
  ' it',
  "'s",
  ' \u2603',
  '\n',
  '  ',
  'x.',
  '7',
  '<',
  '?',
)


def words(rng):
  """Returns a text that is not blank, sometimes with spaces at either end."""
  return rng.choice(('a', 'on', 'up')) + ''.join(rng.choices(PIECES, k=rng.randint(0, 6)))


def message(role, content):
  return {'role': role, 'content': content}


def conversation(rng):
  """Returns messages before a reply, sometimes with a system message or earlier turns."""
  before = [message('system', words(rng))] if rng.random() < 0.3 else []
  for _ in range(rng.choice((0, 0, 1, 2))):
    before += [message('user', words(rng)), message('assistant', words(rng))]
  return before + [message('user', words(rng))]


def chat_shapes(rng, before, good, bad):
  """Returns records whose prompt is the messages `before`, each with its completions."""
  good_, bad_ = message('assistant', good), message('assistant', bad)
  forms = lambda text: (
    text,
    message('assistant', text),
    [message('assistant', text)],
    before + [message('assistant', text)],
  )
  any_of = lambda text: rng.choice(forms(text))
  some = lambda text: rng.choice(forms(text)[1:])  # messages
  gpt = {'user': 'human', 'assistant': 'gpt', 'system': 'system'}
  shared = lambda messages: [{'from': gpt[m['role']], 'value': m['content']} for m in messages]
  asked = rng.choice(({'prompt': before}, {'conversations': shared(before)}, {'messages': before}))
  pair = {'chosen': any_of(good), 'rejected': any_of(bad)}
  verdict = rng.choice(({}, {'ranks': [1, 2]}, {'ratings': [2.5, -1]}, {'best': 0}))
  yield {'messages': before + [good_]}, (good,)
  yield {'messages': shared(before + [good_]), 'label': True}, (good,)
  yield asked, ()
  yield {'prompt': before, 'completion': any_of(good), 'rating': 3}, (good,)
  yield asked | pair, (good, bad)
  yield {'messages': before + [good_]} | pair, (good, bad)
  yield {'chosen': before + [good_], 'rejected': before + [bad_]}, (good, bad)
  yield asked | {'completions': [any_of(good), any_of(bad)]} | verdict, (good, bad)
  # As in UltraFeedback: only the conversation holds the prompt.
  yield (
    {
      'prompt': before[-1]['content'],
      'messages': before + [good_],
      'chosen': before + [good_],
      'rejected': before + [bad_],
    },
    (good, bad),
  )
  yield (
    {
      'prompt': before[-1]['content'],
      'chosen': before + [good_],
      'rejected': rng.choice((bad, before + [bad_])),
    },
    (good, bad),
  )
  cut = next((i for i, m in enumerate(before) if m['role'] == 'assistant'), 0)
  if cut:
    yield (
      {'prompt': before[:cut], 'chosen': before[cut:] + [good_], 'rejected': before[cut:] + [bad_]},
      (good, bad),
    )
  if len(before) == 1:
    question = before[0]['content']
    yield {'prompt': question, 'completion': some(good)}, (good,)
    yield {'prompt': question, 'chosen': any_of(good), 'rejected': some(bad)}, (good, bad)
    yield {'conversations': question, 'chosen': some(good), 'rejected': any_of(bad)}, (good, bad)
    yield {'prompt': question, 'completions': [some(good), any_of(bad)]} | verdict, (good, bad)
    instruction, blank, context = question.partition('\n\n')
    alpaca = {'instruction': instruction} | ({'input': context} if blank else {})
    yield alpaca | {'output': good}, (good,)
    yield alpaca | pair, (good, bad)
    yield alpaca | {'output': good, 'chosen': good_, 'rejected': bad_}, (good, bad)
    yield alpaca | {'output': good, 'prompt': words(rng), 'label': True}, (good,)


def text_shapes(rng, prompt, good, bad):
  """Returns records whose prompt is a text."""
  verdict = rng.choice(({}, {'ranks': [1, 2]}, {'ratings': [2.5, -1]}, {'best': 0}))
  name = rng.choice(('prompt', 'conversations'))
  turn = TURN.format(prompt)
  yield prompt, {'text': prompt}, ()
  yield prompt, {name: prompt}, ()
  yield prompt, {name: prompt, 'completion': good}, (good,)
  yield prompt, {name: prompt, 'completion': good, 'label': True}, (good,)
  yield prompt, {name: prompt, 'completion': good, 'rating': -2.0}, (good,)
  yield prompt, {name: prompt, 'chosen': good, 'rejected': bad, 'margin': 1}, (good, bad)
  yield prompt, {name: prompt, 'completions': [good, bad]} | verdict, (good, bad)
  yield prompt, {'prompt': prompt, 'instruction': words(rng), 'completion': good}, (good,)
  yield turn, {'chosen': turn + good, 'rejected': turn + bad}, (good, bad)


def record(rng, tokenizer):
  """Returns fields, the expected prompt tokens, and the completions, the better one first."""
  good, bad = words(rng), ' no' + words(rng)
  if rng.random() < 0.7:
    before = conversation(rng)
    if len(before) == 1 and rng.random() < 0.5:
      before[0]['content'] = f'{words(rng)}\n\n{words(rng)}'
    fields, answers = rng.choice([*chat_shapes(rng, before, good, bad)])
    ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
    answers = [answer + tokenizer.eos_token for answer in answers]
  else:
    text, fields, answers = rng.choice([*text_shapes(rng, words(rng), good, bad)])
    ids = tokenizer(text)['input_ids']
  others = {'id': rng.randrange(9), 'source': words(rng), 'output_of': [message('user', 'x')]}
  return fields | dict(rng.sample([*others.items()], rng.randint(0, 3))), ids, answers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a tiny model whose tokenizer merges tokens and has a chat template."""
  path = tmp_path_factory.mktemp('model')
  rng = random.Random(1)
  texts = [words(rng) + words(rng) for _ in range(300)]
  tokenizer = tokenizers.train_bpe(texts, 300, str(path))
  tokenizer.chat_template = TEMPLATE
  model = models.create(tiny.LLAMA | {'vocab_size': 300, 'max_position_embeddings': LENGTH + 8})
  hf.save(path, model, model.init(jax.random.key(0)), tokenizer=tokenizer)
  return path


@pytest.fixture(scope='module')
def drawn(folder, tmp_path_factory):
  """Returns the tokenizer, 500 records (fields, prompt ids, completions), and a file of them."""
  rng, tokenizer = random.Random(0), tokenizers.load(str(folder))
  drawn = [record(rng, tokenizer) for _ in range(RECORDS)]
  path = tmp_path_factory.mktemp('data') / 'records.jsonl'
  sources.write(path, [fields for fields, _, _ in drawn])
  return tokenizer, drawn, str(path)


def examples_of(convert, tokenizer, drawn):
  """Returns the examples of records, of which none is left out."""
  found, report = convert(
    [sources.Record(fields, f'{i}') for i, (fields, _, _) in enumerate(drawn)], tokenizer=tokenizer
  )
  assert report.kept == report.read == len(drawn)
  return found


def alone(tokenizer, text):
  """Returns the ids of a completion encoded alone, with one EOS."""
  ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
  return ids + [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)


def test_training_reads_prompt_and_completion_apart(drawn):
  tokenizer, records, _ = drawn
  answered = [r for r in records if r[2]]
  right = [ids + alone(tokenizer, answers[0]) for _, ids, answers in answered]
  examples = examples_of(formats.completions, tokenizer, answered)
  size = {'batch_size': len(answered)}
  ((batch, _),) = pipelines.completion_batches(examples, tokenizer, max_length=LENGTH, **size)
  for row, (_, ids, _), tokens, target in zip(right, answered, batch.tokens, batch.loss_mask):
    assert tokens[: len(row)].tolist() == row
    assert np.flatnonzero(target).tolist() == [*range(len(ids), len(row))]
  texts = examples_of(formats.texts, tokenizer, answered)
  ((batch, valid),) = pipelines.lm_batches(texts, tokenizer, length=LENGTH, **size)
  rows = zip(batch.tokens[valid], batch.segments[valid])
  packed = [t[s == n].tolist() for t, s in rows for n in range(1, s.max() + 1)]
  assert sorted(packed) == sorted(right)
  judged = [r for r in records if len(r[2]) > 1 or 'rating' in r[0] or 'label' in r[0]]
  examples = examples_of(formats.comparisons, tokenizer, judged)
  ((batch, _),) = pipelines.comparison_batches(
    examples, tokenizer, max_length=LENGTH, batch_size=len(judged)
  )
  for (_, ids, answers), tokens, mask in zip(judged, batch.tokens, batch.mask):
    assert [t[m].tolist() for t, m in zip(tokens, mask) if m.any()] == [
      ids + alone(tokenizer, answer) for answer in answers
    ]
  # For some of the records, prompt and completion have other tokens if they are joined.
  joined = [tokenizer(tokenizer.decode(row[1:-1]))['input_ids'] for row in right]
  assert sum(row[:-1] != other for row, other in zip(right, joined)) > 30
  assert len(answered) > 400 and len(judged) > 300


def gold(prompt, response):
  """Returns the same gold score for all responses."""
  del prompt, response
  return 1.0


def prompt_rows(rollout):
  """Returns the token ids of the prompts of a rollout."""
  length = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
  return [
    np.asarray(tokens)[np.asarray(mask)].tolist()
    for tokens, mask in zip(rollout.tokens[:, :length], rollout.mask[:, :length])
  ]


def test_sampling_reads_the_same_prompts(drawn, folder, tmp_path, monkeypatch, capsys):
  tokenizer, records, path = drawn
  right = [ids for _, ids, _ in records]
  examples = examples_of(formats.prompts, tokenizer, records)
  (((prompts, _), _),) = pipelines.prompt_batches(
    examples, tokenizer, batch_size=RECORDS, max_prompt_length=LENGTH
  )
  assert [t[m].tolist() for t, m in zip(prompts.tokens, prompts.mask)] == right

  asked, sample = [], policy_lib.TextPolicy.sample

  def observed(self, *args, **kwargs):
    found = sample(self, *args, **kwargs)
    asked.append(prompt_rows(found.rollout))
    return found

  monkeypatch.setattr(policy_lib.TextPolicy, 'sample', observed)
  settings = {'max_new_tokens': 1, 'temperature': 1.0, 'seed': 0}
  collect.sample(tmp_path, policy=str(folder), prompts=path, count=RECORDS, **settings)
  assert asked.pop() == right
  (tmp_path / 'config.json').write_text('{}')
  policies.run(
    tmp_path,
    title='',
    summary='',
    workdir=tmp_path,
    policies=(('one', str(folder)), ('two', str(folder))),
    baseline='one',
    trained='one',
    best_of=0,
    reward_model='',
    comparisons='',
    prompts=path,
    samples=RECORDS,
    gold=f'{__name__}:gold',
    gold_path='',
    curves=(),
    **settings,
  )
  assert asked.pop() == asked.pop() == right
  monkeypatch.setattr(runtime, 'configure', lambda: None)
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(model=str(folder), data=path, max_new_tokens=1):
    generate.main(['generate'])
  with flagsaver.as_parsed(model=str(folder), data=path, prompt=['a']):
    with pytest.raises(SystemExit, match='set only one of --prompt and --data'):
      generate.main(['generate'])
  assert asked.pop() == right and not asked
  # Encoding the collected texts gives the same tokens.
  rows = [
    json.loads(line)['prompt'] for line in (tmp_path / 'samples.jsonl').read_text().splitlines()
  ]
  again = [row.tolist() for row in tokenizers.encode(tokenizer, rows)]
  assert len(again) > 400 and all(row in right for row in again)


class Rows:
  """Replaces reward_models.RewardModel: records the rows, and scores them by their lengths."""

  def __init__(self, policy):
    self.policy, self.read = policy, []

  def score_tokens(self, tokens, mask):
    self.read += [t[m].tolist() for t, m in zip(tokens, mask)]
    return mask.sum(1).astype(np.float32)


def test_calibration_reads_the_same_comparisons(drawn, folder, tmp_path):
  tokenizer, records, _ = drawn
  pairs = [r for r in records if len(r[2]) > 1]
  sources.write(tmp_path / 'pairs.jsonl', [fields for fields, _, _ in pairs])
  model, params = hf.load(folder)
  scorer = Rows(policy_lib.TextPolicy(model, params, tokenizer))
  gaps, prompts = reward_models.pair_gaps(scorer, str(tmp_path / 'pairs.jsonl'))
  right = [[ids + alone(tokenizer, answer) for answer in answers] for _, ids, answers in pairs]
  assert scorer.read[: 2 * len(pairs)] == sum(right, [])
  assert gaps.tolist() == [len(a) - len(b) for a, b in right] and len(prompts) == len(pairs) > 200


def test_evaluators_read_the_same_prompts(drawn, folder):
  tokenizer, records, path = drawn
  model, params = hf.load(folder)
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  context = evaluators.Context(
    model=model, tokenizer=tokenizer, mesh=mesh, seed=0, load={}, policy=lambda state: state
  )
  block = config_lib.evaluator(
    'text', {'path': path, 'batch_size': RECORDS, 'sampling': {'max_new_tokens': 1}}
  )
  found = []
  with jax.set_mesh(mesh):
    sampler = evaluators.ResponseSampler(block, context)
    sampler.each(
      params,
      lambda params, rollout, examples: (
        found.extend(prompt_rows(rollout)) or {'none': np.zeros(RECORDS)}
      ),
    )
  assert found == [ids for _, ids, _ in records]
