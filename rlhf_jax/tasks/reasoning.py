"""Puzzles of Reasoning Gym: prompts with what their checkers need, and worked examples.

The reward is rlhf_jax.rewards.reasoning:score.
"""

import collections
import itertools
import json
import re
import string

import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import errors
from rlhf_jax.data import sources

PROMPT = '{question}\n'
EOS, PAD = '<eos>', '<pad>'
TRIES = 20  # at most this many puzzles are generated per new one
FREQUENT = 0.2  # fraction of the prompts that a word of the tokenizer is in
_WORD = re.compile(r' ?[A-Za-z]{2,}')


def write(folder, *, families, count, test_count, seed):
  """Writes the data sets and a tokenizer. No test question is a training question.

  demonstrations.jsonl       {"prompt", "completion"}: questions with their answers, for SFT
  prompts.jsonl              {"prompt", "family", "settings", "puzzle"}: the same questions
  test_prompts.jsonl         the same columns, for the test questions
  test_prompts_FAMILY.jsonl  the test questions of one family
  tokenizer/                 see `write_tokenizer`

  Args:
    folder: pathlib.Path of the output folder.
    families: {name of a family: dict of its settings}.
    count: Number of questions per family.
    test_count: Number of test questions per family.
    seed: Random seed.
  """
  train, test, answers = [], [], []
  for family, settings in families.items():
    puzzles = draw(family, settings, count + test_count, seed)
    examples = [record(family, settings, puzzle) for puzzle in puzzles]
    answers += [puzzle['answer'] for puzzle in puzzles[test_count:]]
    train += examples[test_count:]
    test += examples[:test_count]
    sources.write(folder / f'test_prompts_{family}.jsonl', examples[:test_count])
  demonstrations = [
    {'prompt': example['prompt'], 'completion': answer} for example, answer in zip(train, answers)
  ]
  sources.write(folder / 'demonstrations.jsonl', demonstrations)
  sources.write(folder / 'prompts.jsonl', train)
  sources.write(folder / 'test_prompts.jsonl', test)
  texts = [example['prompt'] for example in train + test]
  write_tokenizer(folder / 'tokenizer', texts, ''.join(answers))


def draw(family, settings, count, seed):
  """Generates puzzles with different questions.

  Args:
    family: Name of the family.
    settings: Dict of its settings.
    count: Number of puzzles.
    seed: Random seed.

  Returns:
    List of dicts with `question`, `answer` and `metadata`.

  Raises:
    UserError: The family has fewer than `count` different questions, or a puzzle cannot be
      stored in JSON.
  """
  from rlhf_jax.rewards import reasoning

  dataset = reasoning.create(family, settings, size=TRIES * count, seed=seed)
  puzzles = {}
  for index in range(TRIES * count):
    if len(puzzles) == count:
      break
    puzzle = dataset[index]
    puzzles.setdefault(puzzle['question'], puzzle)
  errors.need(
    len(puzzles) == count,
    f'family {family!r} of Reasoning Gym has only about {len(puzzles)} different questions with '
    f'{dict(settings)}, but {count} are asked for: lower count, or make the puzzles harder',
  )
  for puzzle in itertools.islice(puzzles.values(), 10):
    stored = json.loads(json.dumps(puzzle, default=str))
    same = dataset.score_answer(puzzle['answer'], stored) == dataset.score_answer(
      puzzle['answer'], puzzle
    )
    errors.need(
      same, f'family {family!r} of Reasoning Gym scores otherwise once its puzzles are in JSON'
    )
  return list(puzzles.values())


def record(family, settings, puzzle):
  """Returns the record of a prompt; rewards/reasoning.py reads all columns but the first."""
  return {
    'prompt': PROMPT.format(question=puzzle['question']),
    'family': family,
    'settings': json.dumps(settings),
    'puzzle': json.dumps(puzzle, default=str),
  }


def write_tokenizer(path, prompts, answers=''):
  """Writes a tokenizer for small models: characters, and the words that many prompts share.

  Args:
    path: Folder of the tokenizer.
    prompts: Texts.
    answers: Text with the other characters that are needed.

  Returns:
    The tokenizer.
  """
  counts = collections.Counter(word for text in prompts for word in set(_WORD.findall(text)))
  words = sorted(word for word, n in counts.items() if n > FREQUENT * len(prompts))
  characters = {*string.printable, *answers, *''.join(prompts)}
  tokens = dict.fromkeys([PAD, EOS, *sorted(characters), *words])
  backend = hf_tokenizers.Tokenizer(
    hf_tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD)
  )
  pieces = [rf'{re.escape(word)}(?![A-Za-z])' for word in sorted(words, key=len, reverse=True)]
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.Split(
    hf_tokenizers.Regex('|'.join([*pieces, r'[\s\S]'])), behavior='isolated'
  )
  backend.decoder = hf_tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=PAD
  )
  tokenizer.save_pretrained(path)
  return tokenizer
