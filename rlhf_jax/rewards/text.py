"""Metrics of responses as reward functions, which are evaluators and judges too.

Each function gets a batch and returns one number for each response; see functions.py. Its other
keyword arguments are keys of `config.reward.arguments`, such as `column`: the column of the
prompts' records that holds the reference, a text or a list of texts.

BLEU, chrF and TER are fractions: 1 where sacrebleu has 100. The published metrics are computed over
a corpus and are not means over responses. The functions `corpus_bleu`, `corpus_chrf` and
`corpus_ter` return the score of the whole batch for each of its responses, for an evaluator of kind
'text', which calls them once for all responses.

The libraries are those of the extra 'metrics'; they are imported when a metric is used.
"""

import importlib
import json
import pathlib
import re
import types

from rlhf_jax import errors
from rlhf_jax.rewards import guard
from rlhf_jax.rewards import text_statistics

COLUMN = 'completion'  # default column of the references
UNITS = 'tokens', 'words', 'characters'


def references(prompts, metadata, column):
  """Returns the references of each response, n lists of one or more texts.

  Args:
    prompts: n texts, for messages.
    metadata: n dicts, the columns of the prompts' records.
    column: Name of a column. It holds a text, a number or a list of these.

  Raises:
    UserError: A record has no reference in that column.
  """
  found = []
  for prompt, entry in zip(prompts, metadata, strict=True):
    value = entry.get(column)
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    texts = [str(text) for text in texts if text is not None]
    errors.need(
      texts,
      f'the record of the prompt {guard.shortened(prompt)} has no reference in the column '
      f'{column!r}: its columns are {", ".join(entry) or "none"}. Set the argument `column` to the '
      'column of the references, or complete the record',
    )
    found.append(texts)
  return found


def package(module, extra='metrics'):
  """Imports a module of an optional package.

  Args:
    module: Its name.
    extra: The extra of rlhf_jax that installs it.

  Raises:
    UserError: It is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise errors.UserError(
      f"{module} cannot be imported ({error}): pip install 'rlhf_jax[{extra}]'"
    ) from error


def exact_match(prompts, responses, *, metadata, column=COLUMN):
  """1 if the response equals a reference, else 0. White space at both ends is ignored."""
  groups = references(prompts, metadata, column)
  return [
    float(response.strip() in [text.strip() for text in group])
    for response, group in zip(responses, groups)
  ]


def regex(prompts, responses, *, pattern):
  """1 if a regular expression of Python matches somewhere in the response, else 0."""
  del prompts
  try:
    compiled = re.compile(pattern)
  except (re.error, TypeError) as error:
    raise errors.UserError(f'pattern={pattern!r} is not a regular expression: {error}') from None
  return [float(compiled.search(response) is not None) for response in responses]


def json_schema(prompts, responses, *, schema):
  """1 if the response is JSON that is valid by a schema, else 0.

  `schema` is a JSON schema as a dict, or the path of a file with one
  (https://json-schema.org/specification).
  """
  del prompts
  jsonschema = package('jsonschema')
  if isinstance(schema, str):
    try:
      schema = json.loads(pathlib.Path(schema).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
      raise errors.UserError(f'schema={schema!r} cannot be read: {error}') from None
  kind = jsonschema.validators.validator_for(schema)
  try:
    kind.check_schema(schema)
  except jsonschema.exceptions.SchemaError as error:
    raise errors.UserError(f'schema is not a JSON schema: {error.message}') from None
  validator = kind(schema)

  def valid(response):
    try:
      # NaN and Infinity are not JSON, but Python reads them.
      return validator.is_valid(json.loads(response, parse_constant=_refuse))
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
      return False

  return [float(valid(response)) for response in responses]


def _refuse(name):
  raise ValueError(f'{name} is not JSON')


def length(prompts, responses, *, response_tokens, unit='tokens', limit=0):
  """The length of the response above `limit`, in tokens, words or characters.

  With a negative weight in `config.reward.parts` it is a penalty. Tokens include the EOS.
  """
  del prompts
  errors.need(unit in UNITS, f'unit={unit!r} must be one of {", ".join(UNITS)}')
  count = {
    'tokens': lambda text, tokens: len(tokens),
    'words': lambda text, tokens: len(text.split()),
    'characters': lambda text, tokens: len(text),
  }[unit]
  pairs = zip(responses, response_tokens, strict=True)
  return [max(0.0, float(count(*pair)) - limit) for pair in pairs]


def repetition(prompts, responses, *, n=3):
  """The fraction of the response's n-grams of words that occur earlier in it."""
  del prompts
  _check_n(n)
  return [text_statistics.repetition(response, n) for response in responses]


def distinct(prompts, responses, *, n=2):
  """Fraction of n-grams of the response that are distinct; see text_statistics.distinct."""
  del prompts
  _check_n(n)
  return [text_statistics.distinct([response], n) for response in responses]


def entropy(prompts, responses, *, n=1):
  """The entropy of the response's n-grams in nats; see text_statistics.entropy."""
  del prompts
  _check_n(n)
  return [text_statistics.entropy([response], n) for response in responses]


def msttr(prompts, responses, *, window=text_statistics.SEGMENT):
  """The response's mean segmental type-token ratio; see text_statistics.msttr."""
  del prompts
  _check_n(window, 'window')
  return [text_statistics.msttr([response], window) for response in responses]


def _check_n(value, name='n'):
  errors.need(
    isinstance(value, int) and value > 0, f'{name}={value!r} must be a positive whole number'
  )


def bleu(prompts, responses, *, metadata, column=COLUMN, tokenize='13a'):
  """BLEU of each response by sacrebleu, with effective order: lengths without n-grams are left out.

  `tokenize` is a tokenizer of sacrebleu: 13a, intl, zh, char and others.
  """
  return _each(_bleu(tokenize, effective_order=True), prompts, responses, metadata, column)


def corpus_bleu(prompts, responses, *, metadata, column=COLUMN, tokenize='13a'):
  """BLEU of the whole batch by sacrebleu, the same for each response; see `bleu`."""
  return _corpus(_bleu(tokenize), prompts, responses, metadata, column)


def _bleu(tokenize, *, effective_order=False):
  sacrebleu = package('sacrebleu')
  names = sacrebleu.BLEU.TOKENIZERS
  errors.need(tokenize in names, f'tokenize={tokenize!r} must be one of {", ".join(names)}')
  # `force` leaves out the warning about texts that look tokenized.
  return sacrebleu.BLEU(tokenize=tokenize, effective_order=effective_order, force=True)


def chrf(prompts, responses, *, metadata, column=COLUMN, word_order=0):
  """chrF of each response by sacrebleu; `word_order=2` is chrF++."""
  return _each(_chrf(word_order), prompts, responses, metadata, column)


def corpus_chrf(prompts, responses, *, metadata, column=COLUMN, word_order=0):
  """chrF of the whole batch by sacrebleu, the same for each response; see `chrf`."""
  return _corpus(_chrf(word_order), prompts, responses, metadata, column)


def _chrf(word_order):
  return package('sacrebleu').CHRF(word_order=word_order)


def ter(prompts, responses, *, metadata, column=COLUMN):
  """Translation edit rate of each response by sacrebleu: edits / words of the reference.

  Lower is better; it may be above 1.
  """
  return _each(package('sacrebleu').TER(), prompts, responses, metadata, column)


def corpus_ter(prompts, responses, *, metadata, column=COLUMN):
  """Translation edit rate of the whole batch by sacrebleu, the same for each; see `ter`."""
  return _corpus(package('sacrebleu').TER(), prompts, responses, metadata, column)


def _each(metric, prompts, responses, metadata, column):
  """Returns a metric of sacrebleu for each response."""
  groups = references(prompts, metadata, column)
  pairs = zip(responses, groups)
  return [metric.sentence_score(response, group).score / 100 for response, group in pairs]


def _corpus(metric, prompts, responses, metadata, column):
  """Returns a metric of sacrebleu over all responses together, once for each response."""
  groups = references(prompts, metadata, column)
  if not groups:
    return []
  most = max(map(len, groups))
  # One list per position of the references; sacrebleu leaves out None.
  streams = [[group[i] if i < len(group) else None for group in groups] for i in range(most)]
  return [metric.corpus_score(list(responses), streams).score / 100] * len(responses)


def rouge_1(prompts, responses, *, metadata, column=COLUMN, stemmer=False):
  """ROUGE-1 by rouge-score: F1 of words, of the best reference.

  `stemmer` compares stems, as most papers on summarization do.
  """
  return _rouge('rouge1', prompts, responses, metadata, column, stemmer)


def rouge_2(prompts, responses, *, metadata, column=COLUMN, stemmer=False):
  """ROUGE-2 by rouge-score: F1 of pairs of words; see `rouge_1`."""
  return _rouge('rouge2', prompts, responses, metadata, column, stemmer)


def rouge_l(prompts, responses, *, metadata, column=COLUMN, stemmer=False):
  """ROUGE-L by rouge-score: F1 by the longest common subsequence of words; see `rouge_1`."""
  return _rouge('rougeL', prompts, responses, metadata, column, stemmer)


def rouge_lsum(prompts, responses, *, metadata, column=COLUMN, stemmer=False):
  """ROUGE-Lsum by rouge-score: ROUGE-L by sentences, which are lines; see `rouge_1`."""
  return _rouge('rougeLsum', prompts, responses, metadata, column, stemmer)


def _rouge(kind, prompts, responses, metadata, column, stemmer):
  scorer = package('rouge_score.rouge_scorer').RougeScorer(
    [kind], tokenizer=package('rouge_score.tokenizers').DefaultTokenizer(stemmer)
  )
  groups = references(prompts, metadata, column)
  pairs = zip(responses, groups)
  return [float(scorer.score_multi(group, response)[kind].fmeasure) for response, group in pairs]


def meteor(prompts, responses, *, metadata, column=COLUMN, synonyms=False):
  """METEOR by nltk, of the best reference: words that match exactly or by their stems.

  `synonyms` lets synonyms match too, as in the paper (Lavie & Agarwal 2007,
  https://aclanthology.org/W07-0734). They come from WordNet, which nltk downloads separately:
  `python -m nltk.downloader wordnet`. Scores with and without it cannot be compared. Words are
  those of nltk's Treebank tokenizer, without a split into sentences.
  """
  score = package('nltk.translate.meteor_score').meteor_score
  split = package('nltk.tokenize').NLTKWordTokenizer().tokenize
  wordnet = _wordnet() if synonyms else types.SimpleNamespace(synsets=lambda word: ())
  groups = references(prompts, metadata, column)
  return [
    float(score([split(text) for text in group], split(response), wordnet=wordnet))
    for response, group in zip(responses, groups)
  ]


def _wordnet():
  """Returns nltk's WordNet.

  Raises:
    UserError: Its data are not on this machine.
  """
  wordnet = package('nltk.corpus').wordnet
  try:
    wordnet.ensure_loaded()
  except LookupError as error:
    raise errors.UserError(
      'synonyms=True needs the WordNet data of nltk: python -m nltk.downloader wordnet; or set it '
      'to False'
    ) from error
  return wordnet


def cider(prompts, responses, *, metadata, column=COLUMN):
  """CIDEr-D of each response by pycocoevalcap, from 0 to 10: similarity of weighted n-grams.

  An n-gram weighs more if the references of fewer prompts of the batch have it. So the score
  depends on the batch, and is 0 in a batch of one prompt; the mean over a data set is its CIDEr-D.
  Words are lower-case letters, digits and underscores, where pycocoevalcap uses a tokenizer in
  Java. See Vedantam et al. 2015 (https://arxiv.org/abs/1411.5726).
  """
  scorer = package('pycocoevalcap.cider.cider_scorer').CiderScorer()
  groups = [list(map(_words, group)) for group in references(prompts, metadata, column)]
  if not any(map(any, groups)):  # the library fails without any word
    return [0.0] * len(responses)
  for response, group in zip(responses, groups):
    scorer += (_words(response), group)
  return scorer.compute_score()[1].tolist()


def _words(text):
  return ' '.join(re.findall(r'\w+', text.lower()))


# Workers score one example at a time; see host.py.
for _metric in (corpus_bleu, corpus_chrf, corpus_ter, cider):
  _metric.whole_batch = True
