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
  it, the reward model's accuracy is measured on pairs of it, held_out.jsonl, each text in one, and
  the policies answer its first words, held_out_prompts.jsonl. The other half is texts.jsonl for
  pretraining, pairs.jsonl for the reward model, its first words prompts.jsonl, and what the
  tokenizer is trained on. Prompts and held-out prompts have none in common.

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
  judged, train = halves(path, rng)
  texts = train[1] + train[0]
  rng.shuffle(texts)
  asked = openings(texts, prompt_words)
  others = judged[1] + judged[0]
  write_judge(folder, judged)
  sources.write(folder / 'held_out.jsonl', pairs(judged, 1, rng))
  sources.write(folder / 'texts.jsonl', [{'text': text} for text in texts])
  sources.write(folder / 'pairs.jsonl', pairs(train, pairings, rng))
  sources.write(
    folder / 'prompts.jsonl', [{'prompt': asked[i % len(asked)]} for i in range(prompt_count)]
  )
  rng.shuffle(others)
  known = set(asked)
  sources.write(
    folder / 'held_out_prompts.jsonl',
    [
      {'prompt': prompt}
      for prompt in dict.fromkeys(openings(others, prompt_words))
      if prompt not in known
    ],
  )
  tokenizers.train_bpe(texts, vocab_size, str(folder / 'tokenizer'))


def openings(texts, words):
  """The first words of each text that has more than twice as many."""
  return [' '.join(text.split()[:words]) for text in texts if len(text.split()) > 2 * words]


def write_documents(folder, *, path, vocab_size, snippets, shuffles, seed):
  """Splits the snippets, and writes running text made of them, for configs/lm_human_preferences.py.

  A random half is judge.jsonl ({"text", "label"}), which no model sees. The other half is
  documents.jsonl ({"text"}) and what the tokenizer is trained on. A document is several snippets of
  one polarity, each ended by ' .', in an order that is drawn anew each time.

  Args:
    folder: pathlib.Path they go to.
    path: folder of the two files.
    vocab_size: of the tokenizer.
    snippets: of a document.
    shuffles: how many documents each snippet is in.
    seed: of split and order.
  """
  rng = random.Random(seed)
  judged, train = halves(path, rng)
  documents = []
  for _ in range(shuffles):
    for lines in train.values():
      ended = [
        line if line.endswith(' .') else line + ' .' for line in rng.sample(lines, len(lines))
      ]
      documents += [' '.join(ended[i : i + snippets]) for i in range(0, len(ended), snippets)]
  rng.shuffle(documents)
  write_judge(folder, judged)
  sources.write(folder / 'documents.jsonl', [{'text': text} for text in documents])
  tokenizers.train_bpe(documents, vocab_size, str(folder / 'tokenizer'))


def halves(path, rng):
  """Two random halves of the snippets, each {label: lines}, label 1 for the positive ones."""
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
  """Comparisons of each positive (lines[1]) with `pairings` negatives (lines[0])."""
  records = []
  for _ in range(pairings):
    negatives = rng.sample(lines[0], len(lines[0]))
    records += [
      {'prompt': '', 'chosen': a, 'rejected': b}
      for a, b in zip(rng.sample(lines[1], len(lines[1])), negatives)
    ]
  return records


def sentiment(path):
  """(prompt, response) -> 1.0 if the judge calls their text positive, else 0.0."""
  model = fit_judge(path)
  return lambda prompt, response: float(model.predict([prompt + response])[0])


def positivity(path):
  """(prompt, response) -> probability that the response is positive, by the judge, in (0, 1)."""
  model = fit_judge(path)
  return lambda prompt, response: float(model.predict_proba([response])[0, 1])


def fit_judge(path):
  """An independent judge of sentiment: a logistic model on bags of words and word pairs.

  Args:
    path: data set of {"text", "label"}, label 1 where the text is positive.

  Returns:
    A fitted scikit-learn classifier of texts.
  """
  records = [record.fields for record in sources.read(path)]
  model = make_pipeline(
    CountVectorizer(binary=True, ngram_range=(1, 2), min_df=2, token_pattern=r'\S+'),
    LogisticRegression(C=0.3, max_iter=1000),
  )
  return model.fit([r['text'] for r in records], [r['label'] for r in records])
