"""RL4LMs' toy tasks: write increasing numbers, or write a date; the prompt is empty.

The rewards are those of RL4LMs (https://arxiv.org/abs/2210.01241, commit 97df0bd),
`rl4lms/envs/text_generation/test_reward.py`. RL4LMs starts from GPT-2. Here a small model is
pretrained on generated texts: half are lists of numbers, of which a third increase; half are
sentences, of which some have a date. So both rewards are low at first, and above 0.
"""

import re

import numpy as np
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax.data import sources

MIN_WORDS = 10  # a shorter text is scored as if it had this many words
PAD, BOS, EOS = '<pad>', '<bos>', '<eos>'
DATE = re.compile(r'\d{4}-\d{2}-\d{2}')
DATES = 0.35  # probability that a sentence has a date
WHO = 'he', 'she', 'the farmer', 'the shop', 'my friend', 'the school'
DID = 'sold', 'bought', 'counted', 'lost', 'found', 'packed'
WHAT = 'apples', 'boxes', 'books', 'eggs', 'lamps', 'cups'
WHEN = 'last week', 'on monday', 'in may', 'before noon', 'after the rain', 'in the winter'
OTHER = 'on', 'in'  # words before a date and before a year


def increasing_numbers(prompts, responses):
  """The number of words in the first run of increasing numbers, over max(number of words, 10).

  A run starts at the first number and ends before a number that is not larger than the one before;
  words that are no numbers do not end it. A number is what float() of Python reads.
  """
  del prompts
  return [_increasing(response.split()) for response in responses]


def _increasing(words):
  numbers = [float(word) for word in words if _is_number(word)]
  run = 1
  while run < len(numbers) and numbers[run] > numbers[run - 1]:
    run += 1
  return min(run, len(numbers)) / max(len(words), MIN_WORDS)


def _is_number(word):
  try:
    float(word)
  except ValueError:
    return False
  return True


def dates(prompts, responses):
  """1 if the response contains four digits, two digits and two digits, joined by '-'; else 0."""
  del prompts
  return [float(DATE.search(response) is not None) for response in responses]


def write(folder, *, count, seed):
  """Writes texts.jsonl for pretraining, prompts.jsonl with one empty prompt, and tokenizer/.

  Args:
    folder: pathlib.Path of the output folder.
    count: Number of texts.
    seed: Random seed.
  """
  rng = np.random.default_rng(seed)
  texts = [number_list(rng) if i % 2 else sentence(rng) for i in range(count)]
  sources.write(folder / 'texts.jsonl', [{'text': text} for text in texts])
  sources.write(folder / 'prompts.jsonl', [{'prompt': ''}])
  write_tokenizer(folder / 'tokenizer')


def number_list(rng):
  """Draws 5 to 20 numbers from 0 to 99, which increase, decrease, or are in any order."""
  count, order = rng.integers(5, 21), rng.integers(3)
  if order == 2:
    numbers = rng.integers(100, size=count)
  else:
    numbers = rng.integers(1, 6, count).cumsum()[:: -1 if order else 1]
  return ' '.join(map(str, numbers))


def sentence(rng):
  """Draws a sentence such as 'the shop sold 17 cups on 2014-03-12.'"""
  who, did, what, when = (words[rng.integers(len(words))] for words in (WHO, DID, WHAT, WHEN))
  year, month, day = rng.integers(1950, 2030), rng.integers(1, 13), rng.integers(1, 29)
  kind = rng.random()
  if kind < DATES:
    when = f'on {year}-{month:02}-{day:02}'
  elif kind < 2 * DATES:
    when = f'in {year}'
  return f'{who} {did} {rng.integers(100)} {what} {when}.'


def write_tokenizer(path):
  """Writes the tokenizer: one token for a word or for up to two digits, with the space before it.

  ' 2014-03-12' is ' 20', '14', '-', '03', '-', '12'. Each text starts with BOS.
  """
  words = sorted({word for text in (*WHO, *DID, *WHAT, *WHEN, *OTHER) for word in text.split()})
  digits = [str(i) for i in range(100)] + [f'0{i}' for i in range(10)]
  pieces = [space + word for word in words + digits for space in ('', ' ')]
  vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, '-', '.', ' ', *pieces])}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel(vocabulary, unk_token=PAD))
  pattern = hf_tokenizers.Regex(r' ?[a-z]+| ?\d{1,2}|[\s\S]')
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.Split(pattern, behavior='isolated')
  backend.decoder = hf_tokenizers.decoders.Fuse()
  backend.post_processor = hf_tokenizers.processors.TemplateProcessing(
    single=f'{BOS} $A', special_tokens=[(BOS, vocabulary[BOS])]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
  )
  tokenizer.save_pretrained(path)
