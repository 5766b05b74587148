"""Cross-validated accuracy of reward models, beside two baselines that need no model."""

import json

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.evaluation import calibration
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation import tables


def run(folder, *, reward_models, train, test, max_length, unroll):
  """Scores every fold's test pairs by its own model; prints and writes results.json.

  Args:
    folder: pathlib.Path of the results.
    reward_models: per fold, folders of the reward models whose mean score decides.
    train: per fold, comparisons the baseline is fitted on.
    test: per fold, comparisons nothing was fitted on.
    max_length: tokens of a row.
    unroll: layers unrolled.
  """
  gaps = {'reward model': [], 'bag of words': [], 'shorter wins': []}
  for paths, fitted_on, tested_on in zip(reward_models, train, test):
    gaps['reward model'].append(np.mean([
        policies.pair_gaps(policies.Scorer.load(path, unroll=unroll), tested_on,
                           max_length=max_length) for path in paths], axis=0))
    gaps['bag of words'].append(bag_of_words(pairs_of(fitted_on), pairs_of(tested_on)))
    gaps['shorter wins'].append(np.array(
        [float(len(b) - len(a)) for a, b in pairs_of(tested_on)]))
  rows = []
  for name, parts in gaps.items():
    found = calibration.pairwise(np.concatenate(parts), np.zeros(sum(map(len, parts))))
    rows.append({'stage': name, 'accuracy': round(found.accuracy, 4),
                 'interval': f'[{found.accuracy_low:.3f}, {found.accuracy_high:.3f}]',
                 'by_fold': ' '.join(f'{np.mean(part > 0):.3f}' for part in parts),
                 'ece': round(found.ece, 3), 'pairs': found.count})
  print(tables.stages_table(rows, title='Held-out pair accuracy, 95 % bootstrap interval'))
  (folder / 'results.json').write_text(json.dumps(rows, indent=2))


def pairs_of(path):
  """(chosen, rejected) texts of a data set of comparisons."""
  examples, _ = formats.comparisons(sources.read(path))
  return [e.completions for e in examples]


def bag_of_words(train, test):
  """Gaps [n] of a logistic model on the words of the two replies, fitted on `train` pairs."""
  vectorizer = CountVectorizer(binary=True, min_df=2).fit([text for pair in train for text in pair])
  difference = lambda pairs: (vectorizer.transform([a for a, _ in pairs]).astype(float)
                              - vectorizer.transform([b for _, b in pairs]))
  x = difference(train)
  sign = np.where(np.arange(len(train)) % 2, 1, -1)
  model = LogisticRegression(C=0.03, fit_intercept=False, max_iter=1000)
  model.fit(x.multiply(sign[:, None]).tocsr(), sign)
  return model.decision_function(difference(test))
