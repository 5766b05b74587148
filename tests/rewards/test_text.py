"""Metrics of texts: the libraries' own examples, the libraries on random texts, and plain loops."""

import collections
import json
import math
import sys

import nltk
import numpy as np
from pycocoevalcap.cider import cider_scorer
import pytest
from rouge_score import rouge_scorer
import sacrebleu

from rlhf_jax import errors
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import scorers
from rlhf_jax.rewards import text

# The example of sacrebleu's README, with two references each.
SYSTEM = ['The dog bit the man.', "It wasn't surprising.", 'The man had just bitten him.']
REFERENCES = [
  ['The dog bit the man.', 'The dog had bit the man.'],
  ['It was not unexpected.', 'No one was surprised.'],
  ['The man bit him first.', 'The man had bitten the dog.'],
]
WORDS = ['the', 'cat', 'cats', 'sat', 'mat', 'Dog', 'naïve', '日本', 'don’t', 'x-1', '\n', '.']
WITH_REFERENCES = (
  'exact_match bleu corpus_bleu chrf corpus_chrf ter corpus_ter rouge_1 rouge_2 rouge_l rouge_lsum '
  'meteor cider'
).split()


def score(name, responses, references=None, **arguments):
  """Computes the scores of a metric as a run does; `references` are in the column 'answer'."""
  if references is not None:
    arguments['column'] = 'answer'
  function = functions.load_reward(f'rlhf_jax.rewards.text:{name}', arguments=arguments)
  scores = functions.call(
    function,
    ['a prompt'] * len(responses),
    responses,
    response_tokens=[[1] * len(response.split()) for response in responses],
    metadata=[{'answer': group} for group in references or [''] * len(responses)],
    response_length=50,
  )
  return scores.tolist()


def random_texts(seed, count=30, words=WORDS, empty=True):
  """Returns random responses with one to three references each, some of them empty."""
  draw = np.random.default_rng(seed)
  low = 0 if empty else 1
  one = lambda: ' '.join(draw.choice(words, draw.integers(low, 12)))
  return [one() for _ in range(count)], [
    [one() for _ in range(draw.integers(1, 4))] for _ in range(count)
  ]


def near(values):
  return pytest.approx(list(values), rel=1e-5, abs=1e-6)


def test_examples_of_the_libraries():
  # https://github.com/mjpost/sacrebleu#using-sacrebleu-from-python
  assert score('corpus_bleu', SYSTEM, REFERENCES) == pytest.approx([0.4853] * 3, abs=5e-5)
  assert score('corpus_chrf', SYSTEM, REFERENCES) == pytest.approx([0.5973] * 3, abs=5e-5)
  # https://github.com/google-research/google-research/tree/master/rouge: with a stemmer, words
  # match 6 of 8 and 6 of 9 times, and the longest common subsequence has 5 words.
  target, response = (
    'The quick brown fox jumps over the lazy dog',
    'The quick brown dog jumps on the log.',
  )
  f1 = lambda p, r: 2 * p * r / (p + r)
  assert score('rouge_1', [response], [target], stemmer=True) == near([f1(6 / 8, 6 / 9)])
  assert score('rouge_l', [response], [target], stemmer=True) == near([f1(5 / 8, 5 / 9)])
  # nltk.translate.meteor_score: 0.6944, also without synonyms, and 0 without a match.
  response = (
    'It is a guide to action which ensures that the military always obeys the commands of the party'
  )
  target = 'It is a guide to action that ensures that the military will forever heed Party commands'
  assert score('meteor', [response, 'this is a cat'], [target, 'non matching hypothesis']) == (
    pytest.approx([0.6944, 0], abs=5e-5)
  )


def test_ter_by_hand():
  # One substitution of four words; a shift of two words is one edit; two insertions of one word.
  responses, references = ['a b c x', 'c d a b', 'a b c', 'a'], ['a b c d', 'a b c d', 'a', 'a']
  assert score('ter', responses, references) == near([1 / 4, 1 / 4, 2, 0])
  # Edits and words of all texts.
  assert score('corpus_ter', responses, references) == near([4 / 10] * 4)


@pytest.mark.parametrize('seed', range(3))
def test_random_texts_by_the_libraries(seed):
  """Several references each, empty texts and other scripts."""
  responses, groups = random_texts(seed)
  pairs = list(zip(responses, groups))
  streams = [[group[i] if i < len(group) else None for group in groups] for i in range(3)]
  metrics = {
    'bleu': sacrebleu.BLEU(effective_order=True),
    'chrf': sacrebleu.CHRF(),
    'ter': sacrebleu.TER(),
  }
  for name, metric in metrics.items():
    expected = [metric.sentence_score(*pair).score / 100 for pair in pairs]
    assert score(name, responses, groups) == near(expected)
    whole = sacrebleu.BLEU() if name == 'bleu' else metric
    expected = whole.corpus_score(responses, streams).score / 100
    assert score(f'corpus_{name}', responses, groups) == near([expected] * len(responses))
  for name, kind in {'rouge_2': 'rouge2', 'rouge_lsum': 'rougeLsum'}.items():
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
    expected = [max(scorer.score(one, r)[kind].fmeasure for one in group) for r, group in pairs]
    assert score(name, responses, groups, stemmer=True) == near(expected)
  split = nltk.tokenize.NLTKWordTokenizer().tokenize
  empty = type('Empty', (), {'synsets': lambda self, word: []})()
  expected = [
    max(
      nltk.translate.meteor_score.single_meteor_score(split(one), split(r), wordnet=empty)
      for one in group
    )
    for r, group in pairs
  ]
  assert score('meteor', responses, groups) == near(expected)


def ngrams(words, n):
  return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_corpus_bleu_by_a_loop():
  """Papineni et al. 2002: clipped counts, and the closest length of a reference."""
  responses, groups = random_texts(7, words=['a', 'b'])
  matches, totals, length, closest = np.zeros(4), np.zeros(4), 0, 0
  for response, group in zip(responses, groups):
    words, others = response.split(), [one.split() for one in group]
    length += len(words)
    closest += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
    for n in range(4):
      mine, theirs = ngrams(words, n + 1), [ngrams(o, n + 1) for o in others]
      matches[n] += sum(min(c, max(t[g] for t in theirs)) for g, c in mine.items())
      totals[n] += mine.total()
  expected = min(1, math.exp(1 - closest / length)) * math.exp(np.mean(np.log(matches / totals)))
  assert score('corpus_bleu', responses, groups) == near([expected] * len(responses))


def longest_common(a, b):
  table = np.zeros((len(a) + 1, len(b) + 1), int)
  for i, x in enumerate(a):
    for j, y in enumerate(b):
      table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
  return table[-1, -1]


def test_rouge_by_a_loop():
  responses, groups = random_texts(8, words=['a', 'b', 'c', 'd', 'e1'])
  overlaps = {
    'rouge_1': (lambda a, b: (ngrams(a, 1) & ngrams(b, 1)).total(), 0),
    'rouge_2': (lambda a, b: (ngrams(a, 2) & ngrams(b, 2)).total(), 1),
    'rouge_l': (longest_common, 0),
  }
  for name, (overlap, fewer) in overlaps.items():
    expected = []
    for response, group in zip(responses, groups):
      best, words = 0.0, response.split()
      for one in group:
        same = overlap(words, one.split())
        count = max(len(words) - fewer, 0) + max(len(one.split()) - fewer, 0)
        best = max(best, 2 * same / count if same else 0)
      expected.append(best)
    assert score(name, responses, groups) == near(expected)


def test_cider_by_a_loop_and_by_the_library():
  """CIDEr-D: eq. 1 to 3 of the paper, clipped, with a Gaussian of the difference in length.

  The library takes the number of bigrams as the length.
  """
  responses, groups = random_texts(9, words=['a', 'b', 'c', 'd', 'e', 'f'])
  documents = [
    set().union(*(ngrams(one.split(), n).keys() for one in group for n in range(1, 5)))
    for group in groups
  ]

  def vector(words, n):
    frequency = lambda gram: max(sum(gram in document for document in documents), 1)
    weight = lambda gram: math.log(len(groups) / frequency(gram))
    return {gram: count * weight(gram) for gram, count in ngrams(words, n).items()}

  expected = []
  for response, group in zip(responses, groups):
    total = 0.0
    for one in group:
      a, b = response.split(), one.split()
      distance = max(len(a) - 1, 0) - max(len(b) - 1, 0)
      for n in range(1, 5):
        x, y = vector(a, n), vector(b, n)
        norms = [math.sqrt(sum(value**2 for value in v.values())) for v in (x, y)]
        product = sum(min(x[gram], y.get(gram, 0)) * y.get(gram, 0) for gram in x)
        if all(norms):
          total += math.exp(-(distance**2) / 72) * product / (norms[0] * norms[1]) / 4
    expected.append(10 * total / len(group))
  found = score('cider', responses, groups)
  assert found == near(expected) and max(found) > 0.1
  library = cider_scorer.CiderScorer()
  for pair in zip(responses, groups):
    library += pair
  assert found == near(library.compute_score()[1])
  # Case and punctuation do not count. Without any word in the references all scores are 0.
  upper = [f'{response.upper()} !' for response in responses]
  assert score('cider', upper, groups) == near(expected)
  assert score('cider', ['a', ''], ['', '.']) == [0, 0]


def test_exact_match():
  responses, groups = [' 4\n', 'four', '4.0', ''], [4, ['4', 'four'], 4, '']
  assert score('exact_match', responses, groups) == [1, 1, 0, 1]


def test_regex():
  pattern = r'\d{4}-\d{2}-\d{2}'
  assert score('regex', ['on 2024-01-31.', '2024-1-31', ''], pattern=pattern) == [1, 0, 0]
  assert score('regex', ['Yes', 'yes, no'], pattern=r'(?i)\Ayes\Z') == [1, 0]


def test_json_schema(tmp_path):
  schema = {
    'type': 'object',
    'properties': {'age': {'type': 'integer', 'minimum': 0}},
    'required': ['age'],
  }
  responses = {
    ' {"age": 3, "name": "日本"}\n': 1,
    '{"age": -1}': 0,
    '{"age": "3"}': 0,
    '{}': 0,
    '[3]': 0,
    '{"age": 3': 0,
    '{"age": 3, "x": NaN}': 0,
    '[' * 100_000: 0,
    '': 0,
  }
  file = tmp_path / 'schema.json'
  file.write_text(json.dumps(schema))
  for argument in (schema, str(file)):
    assert score('json_schema', list(responses), schema=argument) == list(responses.values())


def test_length():
  responses = ['one two three', 'naïve', '']  # three tokens, one, none
  assert score('length', responses) == [3, 1, 0]
  assert score('length', responses, unit='words', limit=2) == [1, 0, 0]
  assert score('length', responses, unit='characters') == [13, 5, 0]


def test_statistics_of_each_response():
  responses = ['a b a b a', '']
  assert score('repetition', responses) == near([1 / 3, 0])
  assert score('repetition', responses, n=1) == near([3 / 5, 0])
  assert score('distinct', responses) == near([2 / 4, 0])
  assert score('entropy', responses) == near([-0.6 * math.log(0.6) - 0.4 * math.log(0.4), 0])
  assert score('msttr', responses, window=2) == near([1, 0])


@pytest.mark.parametrize('name', WITH_REFERENCES)
@pytest.mark.parametrize(
  'value', [{}, {'answer': None}, {'answer': []}, {'answer': [None]}], ids=str
)
def test_a_missing_reference_names_record_and_column(name, value):
  metadata = [{'answer': 'a'} | {'source': 'x'}, {'source': 'x'} | value]
  with pytest.raises(errors.UserError) as caught:
    getattr(text, name)(['one', 'two'], ['a', 'b'], metadata=metadata, column='answer')
  assert "the record of the prompt 'two' has no reference in the column 'answer'" in str(
    caught.value
  )
  assert ', '.join(metadata[1]) in str(caught.value)


WRONG = {
  'a misspelt argument': (
    'regex',
    {'patern': 'a'},
    r"does not take config.reward.arguments.patern .* Did you mean 'pattern'",
  ),
  'a missing argument': ('regex', {}, "missing a required argument: 'pattern'"),
  'data as an argument': ('bleu', {'metadata': 1}, "sets 'metadata', which every call sets"),
  'a broken regex': ('regex', {'pattern': '('}, r"text:regex': pattern='\(' is not a regular"),
  'no regex': ('regex', {'pattern': 3}, 'pattern=3 is not a regular expression'),
  'no file': ('json_schema', {'schema': 'none.json'}, "schema='none.json' cannot be read"),
  'no schema': ('json_schema', {'schema': {'type': 'number?'}}, 'not a JSON schema'),
  'no unit': ('length', {'unit': 'lines'}, "unit='lines' must be one of tokens, words"),
  'no n-gram': ('repetition', {'n': 0}, 'n=0 must be a positive whole number'),
  'no window': ('msttr', {'window': 2.5}, 'window=2.5 must be'),
  'no tokenizer': ('bleu', {'tokenize': '14a'}, "tokenize='14a' must be one of none, zh, 13a"),
}


@pytest.mark.parametrize('name, arguments, message', WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_found_when_the_function_is_loaded(name, arguments, message):
  with pytest.raises(errors.UserError, match=message):
    functions.load_reward(f'rlhf_jax.rewards.text:{name}', arguments=arguments)


@pytest.mark.parametrize(
  'name, module',
  [
    ('corpus_bleu', 'sacrebleu'),
    ('rouge_l', 'rouge_score.rouge_scorer'),
    ('meteor', 'nltk.translate.meteor_score'),
    ('cider', 'pycocoevalcap.cider.cider_scorer'),
    ('json_schema', 'jsonschema'),
  ],
)
def test_a_missing_package_names_the_extra(name, module, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  arguments = {'schema': {}} if name == 'json_schema' else {}
  with pytest.raises(errors.UserError, match=rf"{module} .*pip install 'rlhf_jax\[metrics\]'"):
    functions.load_reward(f'rlhf_jax.rewards.text:{name}', arguments=arguments)


def test_synonyms_need_wordnet(monkeypatch):
  monkeypatch.setattr(nltk.data, 'path', [])
  monkeypatch.setattr(
    nltk.corpus,
    'wordnet',
    nltk.corpus.util.LazyCorpusLoader('wordnet', nltk.corpus.reader.WordNetCorpusReader, None),
  )
  with pytest.raises(errors.UserError, match='python -m nltk.downloader wordnet'):
    functions.load_reward('rlhf_jax.rewards.text:meteor', arguments={'synonyms': True})


@pytest.mark.parametrize('name', ['corpus_bleu', 'corpus_chrf', 'corpus_ter', 'cider'])
def test_metrics_of_a_whole_batch_do_not_run_in_workers(name):
  block = scorers.config()
  block.update({'function': f'rlhf_jax.rewards.text:{name}', 'workers': 2})
  with pytest.raises(errors.UserError, match='needs the whole batch.*workers to 0'):
    scorers.validate(block)
