"""Cross-validation of reward models on HH comparisons, with two baselines."""

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

  All comparisons with the same prompt (the full dialogue) are in one fold. The tokenizer of a fold
  is trained on its training part only, on both responses of every pair.

  Args:
    folder: pathlib.Path of the output folder.
    path: Data set of comparisons.
    count: Number of folds.
    vocab_size: Vocabulary size of the tokenizers.
    turns: Number of last turns of a dialogue to keep as the prompt; the assistant's opening counts
      as one. 0 keeps all.
    seed: Random seed of the split.
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
  """Assigns prompts to folds of nearly equal size, equal prompts to the same fold.

  Distinct prompts are visited in random order, and each goes to the smallest fold so far.

  Args:
    prompts: n texts.
    count: Number of folds.
    seed: Random seed of the order.

  Returns:
    Fold of each prompt, [n] int.
  """
  sizes = collections.Counter(prompts)
  distinct, fold_of, filled = list(sizes), {}, np.zeros(count, int)
  for index in np.random.default_rng(seed).permutation(len(distinct)):
    prompt = distinct[index]
    fold_of[prompt] = np.argmin(filled)
    filled[fold_of[prompt]] += sizes[prompt]
  return np.array([fold_of[prompt] for prompt in prompts])


def last_turns(prompt, count):
  """Returns the last `count` turns of an HH dialogue, counting the assistant's opening as one."""
  if not count:
    return prompt
  pieces = prompt.split('\n\n')
  starts = [i for i, piece in enumerate(pieces) if piece.startswith(('Human:', 'Assistant:'))]
  return '\n\n' + '\n\n'.join(pieces[starts[-count] :]) if len(starts) > count else prompt


def run(folder, *, reward_models, train, test, max_length):
  """Evaluates reward models and baselines on the test pairs of all folds; writes results.json.

  Args:
    folder: pathlib.Path of the output folder.
    reward_models: For each fold, folders of the reward models, whose scores are averaged.
    train: For each fold, the comparisons to fit the baseline on.
    test: For each fold, the comparisons to evaluate on.
    max_length: Maximum number of tokens of prompt and response.
  """
  gaps, prompts = {'reward model': [], 'bag of words': [], 'shorter wins': []}, []
  for paths, fitted_on, tested_on in zip(reward_models, train, test):
    results = [
      reward_models_lib.pair_gaps(
        reward_models_lib.RewardModel.load(path), tested_on, max_length=max_length
      )
      for path in paths
    ]
    gaps['reward model'].append(np.mean([gaps for gaps, _ in results], axis=0))
    prompts += results[0][1]
    gaps['bag of words'].append(bag_of_words(pairs_of(fitted_on), pairs_of(tested_on)))
    gaps['shorter wins'].append(np.array([float(len(b) - len(a)) for a, b in pairs_of(tested_on)]))
  rows = []
  for name, parts in gaps.items():
    result = calibration.pairwise(
      np.concatenate(parts), np.zeros(sum(map(len, parts))), prompts=prompts
    )
    rows.append(
      {
        'stage': name,
        'accuracy': round(result.accuracy, 4),
        'interval': f'[{result.accuracy_low:.3f}, {result.accuracy_high:.3f}]',
        'by_fold': ' '.join(f'{np.mean(part > 0):.3f}' for part in parts),
        'ece': round(result.ece, 3),
        'pairs': result.count,
      }
    )
  print(tables.stages_table(rows, title='Held-out pair accuracy, 95 % interval'))
  (folder / 'results.json').write_text(json.dumps(rows, indent=2))


def pairs_of(path):
  """Reads the (chosen, rejected) texts of a data set of comparisons."""
  examples, _ = formats.comparisons(sources.read(path))
  return [e.completions for e in examples]


def bag_of_words(train, test):
  """Fits a logistic model on the words of `train` pairs; returns its gaps [n] on `test` pairs."""
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
