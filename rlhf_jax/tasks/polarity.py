"""Film-review snippets as a preference task, in which positive snippets are preferred.

Reads the sentence polarity data set of Pang & Lee 2005 (https://arxiv.org/abs/cs/0506075):
rt-polarity.pos and rt-polarity.neg, with one snippet per line.
"""

import pathlib
import random

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers


def write(folder, *, path, vocab_size, pairings, prompt_words, prompt_count, seed):
  """Splits the snippets into halves and writes all data sets of configs/sentiment.py.

  From one random half, which no model is trained on:
    judge.jsonl             {"text", "label"}, to fit the judge
    held_out.jsonl          pairs to evaluate the reward model on, with each text in one pair
    held_out_prompts.jsonl  first words of texts, as prompts of the evaluation
  From the other half:
    texts.jsonl             texts for pretraining and for the tokenizer
    pairs.jsonl             pairs to train the reward model on
    prompts.jsonl           first words of texts, as prompts of PPO
    tokenizer/
  No prompt is in both files.

  Args:
    folder: pathlib.Path of the output folder.
    path: Folder of the two files.
    vocab_size: Vocabulary size of the tokenizer.
    pairings: Number of negatives that each positive is compared with in training.
    prompt_words: Number of words of a prompt.
    prompt_count: Number of prompts for training.
    seed: Random seed of the split.
  """
  rng = random.Random(seed)
  held_out, train = split_halves(path, rng)
  texts = train[1] + train[0]
  rng.shuffle(texts)
  prompts = first_words(texts, prompt_words)
  held_out_texts = held_out[1] + held_out[0]
  write_judge(folder, held_out)
  sources.write(folder / 'held_out.jsonl', pairs(held_out, 1, rng))
  sources.write(folder / 'texts.jsonl', [{'text': text} for text in texts])
  sources.write(folder / 'pairs.jsonl', pairs(train, pairings, rng))
  sources.write(
    folder / 'prompts.jsonl', [{'prompt': prompts[i % len(prompts)]} for i in range(prompt_count)]
  )
  rng.shuffle(held_out_texts)
  used = set(prompts)
  sources.write(
    folder / 'held_out_prompts.jsonl',
    [
      {'prompt': prompt}
      for prompt in dict.fromkeys(first_words(held_out_texts, prompt_words))
      if prompt not in used
    ],
  )
  tokenizers.train_bpe(texts, vocab_size, str(folder / 'tokenizer'))


def first_words(texts, words):
  """Returns the first `words` words of each text of more than 2 * `words` words."""
  return [' '.join(text.split()[:words]) for text in texts if len(text.split()) > 2 * words]


def write_documents(folder, *, path, vocab_size, snippets, shuffles, seed):
  """Splits the snippets and joins them into documents, for configs/lm_human_preferences.py.

  One random half becomes judge.jsonl ({"text", "label"}), which no model is trained on. The other
  half becomes documents.jsonl ({"text"}), on which the tokenizer is trained too. A document joins
  several snippets of one polarity in random order; each snippet ends with ' .'.

  Args:
    folder: pathlib.Path of the output folder.
    path: Folder of the two files.
    vocab_size: Vocabulary size of the tokenizer.
    snippets: Number of snippets per document.
    shuffles: Number of documents that contain each snippet.
    seed: Random seed of split and order.
  """
  rng = random.Random(seed)
  held_out, train = split_halves(path, rng)
  documents = []
  for _ in range(shuffles):
    for lines in train.values():
      ended = [
        line if line.endswith(' .') else line + ' .' for line in rng.sample(lines, len(lines))
      ]
      documents += [' '.join(ended[i : i + snippets]) for i in range(0, len(ended), snippets)]
  rng.shuffle(documents)
  write_judge(folder, held_out)
  sources.write(folder / 'documents.jsonl', [{'text': text} for text in documents])
  tokenizers.train_bpe(documents, vocab_size, str(folder / 'tokenizer'))


def split_halves(path, rng):
  """Returns two random halves of the snippets, each as {label: lines}; label 1 means positive."""
  first, second = {}, {}
  for label, name in ((1, 'rt-polarity.pos'), (0, 'rt-polarity.neg')):
    records = sources.read(str(pathlib.Path(path) / name), format='text')
    lines = [record.fields['text'].strip() for record in records]
    rng.shuffle(lines)
    first[label], second[label] = lines[: len(lines) // 2], lines[len(lines) // 2 :]
  return first, second


def write_judge(folder, lines):
  """Writes judge.jsonl from {label: lines}."""
  sources.write(
    folder / 'judge.jsonl',
    [{'text': line, 'label': label} for label, each in lines.items() for line in each],
  )


def pairs(lines, pairings, rng):
  """Returns comparisons of each positive (lines[1]) with `pairings` negatives (lines[0])."""
  records = []
  for _ in range(pairings):
    negatives = rng.sample(lines[0], len(lines[0]))
    records += [
      {'prompt': '', 'chosen': a, 'rejected': b}
      for a, b in zip(rng.sample(lines[1], len(lines[1])), negatives)
    ]
  return records


def sentiment(path):
  """Returns a gold score: 1.0 if the judge classifies prompt + response as positive, else 0.0.

  Args:
    path: See `fit_judge`.
  """
  model = fit_judge(path)
  return lambda prompt, response: float(model.predict([prompt + response])[0])


def positivity(path):
  """Returns a gold score: the judge's probability that the response is positive, in (0, 1).

  Args:
    path: See `fit_judge`.
  """
  model = fit_judge(path)
  return lambda prompt, response: float(model.predict_proba([response])[0, 1])


def fit_judge(path):
  """Fits a judge of sentiment: a logistic model on bags of words and word pairs.

  Args:
    path: Data set of {"text", "label"}; label 1 means positive.

  Returns:
    Fitted scikit-learn classifier of texts.
  """
  records = [record.fields for record in sources.read(path)]
  model = make_pipeline(
    CountVectorizer(binary=True, ngram_range=(1, 2), min_df=2, token_pattern=r'\S+'),
    LogisticRegression(C=0.3, max_iter=1000),
  )
  return model.fit([r['text'] for r in records], [r['label'] for r in records])
