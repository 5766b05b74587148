"""Film-review snippets as a preference task: the positive one should win.

Reads the sentence polarity data set of Pang & Lee 2005
(https://arxiv.org/abs/cs/0506075): rt-polarity.pos and rt-polarity.neg, a snippet a line.
"""

import pathlib
import random

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers


def write(folder, *, path, vocab_size, pairings, prompt_words, prompt_count, seed):
  """Splits the snippets, and writes every data set of configs/sentiment.py.

  A random half is judge.jsonl ({"text", "label"}), which no model sees: the judge is fitted on
  it, and the reward model's accuracy is measured on pairs of it, held_out.jsonl. The other half
  is texts.jsonl for pretraining, pairs.jsonl for the reward model, its first words
  prompts.jsonl, and what the tokenizer is trained on.

  Args:
    folder: pathlib.Path they go to.
    path: folder of the two files.
    vocab_size: of the tokenizer.
    pairings: how many negatives each training positive is compared with.
    prompt_words: words of a snippet that make a prompt.
    prompt_count: prompts.
    seed: of the split.
  """
  rng = random.Random(seed)
  judge, train = {}, {}
  for label, name in ((1, 'rt-polarity.pos'), (0, 'rt-polarity.neg')):
    lines = [r.fields['text'].strip() for r in sources.read(str(pathlib.Path(path) / name))]
    rng.shuffle(lines)
    judge[label], train[label] = lines[:len(lines) // 2], lines[len(lines) // 2:]
  texts = train[1] + train[0]
  rng.shuffle(texts)
  openings = [' '.join(text.split()[:prompt_words]) for text in texts
              if len(text.split()) > 2 * prompt_words]
  sources.write(folder / 'judge.jsonl', [
      {'text': line, 'label': label} for label, lines in judge.items() for line in lines])
  sources.write(folder / 'held_out.jsonl', pairs(judge, 2, rng))
  sources.write(folder / 'texts.jsonl', [{'text': text} for text in texts])
  sources.write(folder / 'pairs.jsonl', pairs(train, pairings, rng))
  sources.write(folder / 'prompts.jsonl', [
      {'prompt': openings[i % len(openings)]} for i in range(prompt_count)])
  tokenizers.train_bpe(texts, vocab_size, str(folder / 'tokenizer'))


def pairs(lines, pairings, rng):
  """Comparisons of each positive (lines[1]) with `pairings` negatives (lines[0])."""
  records = []
  for _ in range(pairings):
    negatives = rng.sample(lines[0], len(lines[0]))
    records += [{'prompt': '', 'chosen': a, 'rejected': b}
                for a, b in zip(rng.sample(lines[1], len(lines[1])), negatives)]
  return records


def sentiment(path):
  """An independent judge of sentiment: a logistic model on bags of words and word pairs.

  Args:
    path: data set of {"text", "label"}, label 1 where the text is positive.

  Returns:
    Function (prompt, response) -> 1.0 if the judge calls their text positive, else 0.0.
  """
  records = [record.fields for record in sources.read(path)]
  model = make_pipeline(
      CountVectorizer(binary=True, ngram_range=(1, 2), min_df=2, token_pattern=r'\S+'),
      LogisticRegression(C=0.3, max_iter=1000))
  model.fit([r['text'] for r in records], [r['label'] for r in records])
  return lambda prompt, response: float(model.predict([prompt + response])[0])
