"""HH comparisons in folds: cross-validated reward models, beside two baselines that need no model."""

import collections
import json

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import reward_models as reward_models_lib
from rlhf_jax.evaluation import tables
from rlhf_jax.rewards import calibration


def write(folder, *, path, count, vocab_size, turns, seed):
  """Writes train_K.jsonl, test_K.jsonl and tokenizer_K for every fold K.

  All comparisons of a prompt, its whole dialogue, are in one fold. A fold's tokenizer comes from its
  training part alone: both replies of every pair.

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
  records = [
    {
      'prompt': last_turns(e.prompt, turns),
      'chosen': e.completions[0],
      'rejected': e.completions[1],
    }
    for e in examples
  ]
  fold_of = folds_of([e.prompt for e in examples], count, seed)
  for fold in range(count):
    train = [r for r, f in zip(records, fold_of) if f != fold]
    texts = [r['prompt'] + r[key] for r in train for key in ('chosen', 'rejected')]
    sources.write(folder / f'train_{fold}.jsonl', train)
    sources.write(folder / f'test_{fold}.jsonl', [r for r, f in zip(records, fold_of) if f == fold])
    tokenizers.train_bpe(texts, vocab_size, str(folder / f'tokenizer_{fold}'))


def folds_of(prompts, count, seed):
  """Folds of equal size but for whole prompts: each in random order goes to the smallest so far.

  Args:
    prompts: n texts.
    count: folds.
    seed: of the order.

  Returns:
    The fold of each prompt, [n] int.
  """
  sizes = collections.Counter(prompts)
  distinct, fold_of, filled = list(sizes), {}, np.zeros(count, int)
  for index in np.random.default_rng(seed).permutation(len(distinct)):
    prompt = distinct[index]
    fold_of[prompt] = np.argmin(filled)
    filled[fold_of[prompt]] += sizes[prompt]
  return np.array([fold_of[prompt] for prompt in prompts])


def last_turns(prompt, count):
  """The end of an HH dialogue: its last `count` turns, the assistant's opening included."""
  if not count:
    return prompt
  pieces = prompt.split('\n\n')
  starts = [i for i, piece in enumerate(pieces) if piece.startswith(('Human:', 'Assistant:'))]
  return '\n\n' + '\n\n'.join(pieces[starts[-count] :]) if len(starts) > count else prompt


def run(folder, *, reward_models, train, test, max_length):
  """Scores every fold's test pairs by its own model; prints and writes results.json.

  Args:
    folder: pathlib.Path of the results.
    reward_models: per fold, folders of the reward models whose mean score decides.
    train: per fold, comparisons the baseline is fitted on.
    test: per fold, comparisons nothing was fitted on.
    max_length: tokens of a row.
  """
  gaps, prompts = {'reward model': [], 'bag of words': [], 'shorter wins': []}, []
  for paths, fitted_on, tested_on in zip(reward_models, train, test):
    found = [
      reward_models_lib.pair_gaps(
        reward_models_lib.RewardModel.load(path), tested_on, max_length=max_length
      )
      for path in paths
    ]
    gaps['reward model'].append(np.mean([gaps for gaps, _ in found], axis=0))
    prompts += found[0][1]
    gaps['bag of words'].append(bag_of_words(pairs_of(fitted_on), pairs_of(tested_on)))
    gaps['shorter wins'].append(np.array([float(len(b) - len(a)) for a, b in pairs_of(tested_on)]))
  rows = []
  for name, parts in gaps.items():
    found = calibration.pairwise(
      np.concatenate(parts), np.zeros(sum(map(len, parts))), prompts=prompts
    )
    rows.append(
      {
        'stage': name,
        'accuracy': round(found.accuracy, 4),
        'interval': f'[{found.accuracy_low:.3f}, {found.accuracy_high:.3f}]',
        'by_fold': ' '.join(f'{np.mean(part > 0):.3f}' for part in parts),
        'ece': round(found.ece, 3),
        'pairs': found.count,
      }
    )
  print(tables.stages_table(rows, title='Held-out pair accuracy, 95 % interval'))
  (folder / 'results.json').write_text(json.dumps(rows, indent=2))


def pairs_of(path):
  """(chosen, rejected) texts of a data set of comparisons."""
  examples, _ = formats.comparisons(sources.read(path))
  return [e.completions for e in examples]


def bag_of_words(train, test):
  """Gaps [n] of a logistic model on the words of the two replies, fitted on `train` pairs."""
  vectorizer = CountVectorizer(binary=True, min_df=2).fit([text for pair in train for text in pair])
  difference = lambda pairs: (
    vectorizer.transform([a for a, _ in pairs]).astype(float)
    - vectorizer.transform([b for _, b in pairs])
  )
  x = difference(train)
  sign = np.where(np.arange(len(train)) % 2, 1, -1)
  model = LogisticRegression(C=0.03, fit_intercept=False, max_iter=1000)
  model.fit(x.multiply(sign[:, None]).tocsr(), sign)
  return model.decision_function(difference(test))
