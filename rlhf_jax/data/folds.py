"""Comparisons split into folds for cross-validation."""

import numpy as np

from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers


def write(folder, *, path, count, vocab_size, turns, seed):
  """Writes train_K.jsonl, test_K.jsonl and tokenizer_K for every fold K.

  A fold's tokenizer comes from its training part alone: both replies of every pair.

  Args:
    folder: pathlib.Path they go to.
    path: data set of comparisons.
    count: folds.
    vocab_size: of the tokenizers.
    turns: keep this many last turns of a dialogue as the prompt, the assistant's opening being
      the last; 0 keeps all.
    seed: of the split.
  """
  examples, report = formats.comparisons(sources.read(path))
  print(f'{path}: {report}')
  records = [{'prompt': last_turns(e.prompt, turns), 'chosen': e.completions[0],
              'rejected': e.completions[1]} for e in examples]
  fold_of = np.random.default_rng(seed).permutation(len(records)) % count
  for fold in range(count):
    train = [r for r, f in zip(records, fold_of) if f != fold]
    texts = [r['prompt'] + r[key] for r in train for key in ('chosen', 'rejected')]
    sources.write(folder / f'train_{fold}.jsonl', train)
    sources.write(folder / f'test_{fold}.jsonl', [r for r, f in zip(records, fold_of) if f == fold])
    tokenizers.train_bpe(texts, vocab_size, str(folder / f'tokenizer_{fold}'))


def last_turns(prompt, count):
  """The end of an HH dialogue: its last `count` turns, the assistant's opening included."""
  if not count:
    return prompt
  pieces = prompt.split('\n\n')
  starts = [i for i, piece in enumerate(pieces) if piece.startswith(('Human:', 'Assistant:'))]
  return '\n\n' + '\n\n'.join(pieces[starts[-count]:]) if len(starts) > count else prompt

