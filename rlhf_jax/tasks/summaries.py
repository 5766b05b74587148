"""Summaries of generated posts, in the form of the TL;DR data set.

A post tells of two events, one of them twice; the summary is the sentence about that one, which is
in the title too:

    TITLE: the lamps
    POST: it was a long day. i heard that the lamps froze outside overnight. the cups fell upstairs
    twice. as always, the lamps froze outside overnight.
    TL;DR: the lamps froze outside overnight.

The demonstrations for SFT are as careless as summaries on the web: half of them are about the other
event. `convert` prepares a user's own posts and references instead. See Stiennon et al. 2020
(https://arxiv.org/abs/2009.01325) for the real task.
"""

import random

from rlhf_jax import errors
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers

PROMPT = 'TITLE: the {title}\nPOST: {post}\nTL;DR:'
ENDING = 'TL;DR:'
CARELESS = 0.5  # fraction of demonstrations about the other event
WHAT = 'apples', 'boxes', 'books', 'eggs', 'lamps', 'cups', 'chairs', 'shoes', 'bikes', 'maps'
DID = 'arrived', 'vanished', 'fell', 'burned', 'froze', 'broke', 'returned', 'changed'
WHERE = 'outside', 'upstairs', 'nearby', 'abroad', 'downtown', 'backstage'
WHEN = 'yesterday', 'today', 'overnight', 'twice', 'again', 'slowly'
OPENINGS = '', '', 'i heard that ', 'it seems that ', 'as always, '
FILLERS = 'it was a long day.', 'the weather was cold.', 'nobody was surprised.', 'i had no time.'


def write(folder, *, count, test_count, vocab_size, seed):
  """Writes the generated data sets and a tokenizer.

  demonstrations.jsonl  {"prompt", "completion"}: posts with careless summaries, for SFT
  prompts.jsonl         {"prompt", "completion"}: other posts with their references
  test_prompts.jsonl    the same of others
  comparisons.jsonl     {"prompt", "chosen", "rejected"}: for a reward model; the reference, and a
                        summary of the other event
  tokenizer/            byte-level BPE

  Args:
    folder: pathlib.Path of the output folder.
    count: Number of demonstrations, of prompts and of comparisons.
    test_count: Number of test prompts.
    vocab_size: Vocabulary size of the tokenizer.
    seed: Random seed.
  """
  rng = random.Random(seed)
  posts = [draw(rng) for _ in range(3 * count + test_count)]
  shown, asked, compared = (posts[i * count : (i + 1) * count] for i in range(3))
  demonstrations = [
    {'prompt': prompt, 'completion': wrong if rng.random() < CARELESS else reference}
    for prompt, reference, wrong in shown
  ]
  comparisons = [
    {'prompt': prompt, 'chosen': reference, 'rejected': wrong}
    for prompt, reference, wrong in compared
  ]
  sources.write(folder / 'demonstrations.jsonl', demonstrations)
  sources.write(folder / 'comparisons.jsonl', comparisons)
  for name, part in (('prompts', asked), ('test_prompts', posts[3 * count :])):
    records = [{'prompt': prompt, 'completion': reference} for prompt, reference, _ in part]
    sources.write(folder / f'{name}.jsonl', records)
  texts = [record['prompt'] + record['completion'] for record in demonstrations]
  tokenizers.train_bpe(texts, vocab_size, str(folder / 'tokenizer'))


def draw(rng):
  """Draws a post.

  Args:
    rng: random.Random.

  Returns:
    The prompt, the reference, and a summary of the other event; both begin with a space.
  """
  slots = [rng.sample(words, 2) for words in (WHAT, DID, WHERE, WHEN)]
  event, other = (f'the {" ".join(words)}.' for words in zip(*slots))
  sentences = [rng.choice(OPENINGS) + text for text in (event, event, other)]
  rng.shuffle(sentences)
  sentences.insert(rng.randrange(4), rng.choice(FILLERS))
  prompt = PROMPT.format(title=slots[0][0], post=' '.join(sentences))
  return prompt, f' {event}', f' {other}'


def convert(folder, *, path, test_count, seed):
  """Writes demonstrations.jsonl, prompts.jsonl and test_prompts.jsonl of a user's posts.

  A prompt that does not end in "TL;DR:" gets that line. The demonstrations are the references.

  Args:
    folder: pathlib.Path of the output folder.
    path: Data set of {"prompt", "reference"}.
    test_count: Number of posts, drawn at random, that only the test has.
    seed: Random seed of the split.

  Raises:
    UserError: A record has no such columns, or there are not enough records.
  """
  records = []
  for record in sources.read(path):
    for key in ('prompt', 'reference'):
      errors.need(
        isinstance(record.fields.get(key), str),
        f'{record.where}: has no text {key!r}; each record must be {{"prompt", "reference"}}',
      )
    prompt, reference = record.fields['prompt'].rstrip(), record.fields['reference'].strip()
    prompt = prompt if prompt.endswith(ENDING) else f'{prompt}\n{ENDING}'
    records.append({'prompt': prompt, 'completion': f' {reference}'})
  errors.need(
    len(records) > test_count,
    f'{path}: has {len(records)} records, but {test_count} are for the test: give more records, or '
    'lower config.world.test_count',
  )
  random.Random(seed).shuffle(records)
  test, train = records[:test_count], records[test_count:]
  sources.write(folder / 'demonstrations.jsonl', train)
  sources.write(folder / 'prompts.jsonl', train)
  sources.write(folder / 'test_prompts.jsonl', test)
