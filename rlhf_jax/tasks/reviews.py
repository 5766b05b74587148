"""Generated product reviews with a hidden gold score, for RLHF without a download.

A document is `Review of the kettle: it heats fast and wipes clean. i would buy it again.`; the
prompt ends with the colon, and the response begins with the space after it. A grammar of sentence
templates over some 270 words generates reviews that are positive, negative, mixed or neutral. Some
sentences are corrupted (words shuffled, dropped or repeated) or about another product.

The gold score, which only the simulated annotators and the evaluation may see, rewards positive,
on-topic, well-formed reviews. It has three parts, computed from the text with the same word lists:

    score = form * (2 * sentiment + topic) - 3 * (1 - form),    in [-3, 3]

* form, in [0, 1]: the mean of the sentences' forms times a length factor. A sentence of the
  grammar has form 1; any other has 0.7 times the squared fraction of its word pairs that occur in
  the grammar. A repeated sentence has form 0; the form of a last sentence without a full stop is
  halved. The length factor is 1 from 8 to 28 words and falls linearly to 0 at 0 and at 56 words.
* sentiment, in [-1, 1]: the sum of the sentences' sentiments divided by the number of sentences, or
  by 2 for a single sentence. The sentiment of a sentence is the sum of its opinions, clipped to
  [-1, 1]. The strength of an opinion word or phrase is 0.7 if plain and 1.0 if strong, negative if
  it is unfavourable. It is multiplied by 1.4 after words like "very", by 0.6 after words like
  "quite" and by -0.6 after "not" or "never", then clipped to [-1, 1]. Each opinion counts once per
  review.
* topic, in [-1, 1]: (right - wrong) / max(right + wrong, 2) over the distinct mentions of products,
  features and behaviours. A product is right if it is that of the prompt; a feature or behaviour is
  right if it belongs to the category of that product.

So nonsense scores -3, a fluent on-topic rave 3, the same rave about the wrong category 1, and a
fluent on-topic complaint -1; repeating the best sentence gains nothing.
"""

import dataclasses
import functools
import itertools
import random
import re

from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.tasks import review_grammar as grammar

MIN_WORDS, MAX_WORDS = 8, 28  # words of a response


def corpus(n: int, seed: int) -> list[dict[str, str]]:
  """Returns n documents `{"text"}` of all moods.

  A quarter of the sentences are corrupted, and a quarter are off topic.
  """
  rng = random.Random(f'corpus {seed}')
  return [
    {'text': ''.join(_review(rng, tuple(grammar.MOODS), corrupted=0.25, off_topic=0.25))}
    for _ in range(n)
  ]


def demonstrations(n: int, seed: int) -> list[dict[str, str]]:
  """Returns n records `{"prompt", "completion"}` of all moods, most well-formed and on topic."""
  rng = random.Random(f'demonstrations {seed}')
  return [
    _record(_review(rng, tuple(grammar.MOODS), corrupted=0.04, off_topic=0.04)) for _ in range(n)
  ]


def ideal(n: int, seed: int) -> list[dict[str, str]]:
  """Returns n records `{"prompt", "completion"}`, all positive, well-formed and on topic.

  Their gold score is the ceiling that a policy can reach.
  """
  rng = random.Random(f'ideal {seed}')
  return [_record(_review(rng, ('positive',), corrupted=0.0, off_topic=0.0)) for _ in range(n)]


def prompts(n: int, seed: int) -> list[dict[str, str]]:
  """Returns n records `{"prompt"}`."""
  rng = random.Random(f'prompts {seed}')
  return [{'prompt': _prompt(rng, rng.choice(grammar.PRODUCTS))} for _ in range(n)]


@dataclasses.dataclass(frozen=True)
class Gold:
  """The gold score and its parts; see the top of the file."""

  score: float
  form: float
  sentiment: float
  topic: float


def gold_score(prompt: str, response: str) -> float:
  """Computes the gold score of a response, in [-3, 3]; see the top of the file.

  Raises:
    UserError: The last line of the prompt names no product of the grammar.
  """
  return gold_parts(prompt, response).score


def sentiment(prompt: str, response: str) -> float:
  """Computes the sentiment of a response, in [-1, 1]; see the top of the file."""
  return gold_parts(prompt, response).sentiment


def on_topic(prompts: list[str], responses: list[str]) -> list[float]:
  """Returns 1 for a response that mentions nothing of another product or category, else 0."""
  mentions = (_mentioned([part.split() for part in response.split('.')]) for response in responses)
  return [
    float(all(_product_of(prompt) in _mentions()[phrase] for phrase in phrases))
    for prompt, phrases in zip(prompts, mentions)
  ]


def well_formed(prompts: list[str], responses: list[str]) -> list[float]:
  """Returns 1 for a response with a form of at least 0.9, else 0; see the top of the file."""
  return [float(gold_parts(*pair).form >= 0.9) for pair in zip(prompts, responses)]


def gold_parts(prompt: str, response: str) -> Gold:
  """Computes the gold score and its parts."""
  product = _product_of(prompt)
  *sentences, tail = [part.split() for part in response.split('.')]
  if tail:
    sentences.append(tail)
  form = _form(sentences, finished=not tail)
  sentiment = _sentiment(sentences)
  topic = _topic(sentences, product)
  score = form * (2.0 * sentiment + topic) - 3.0 * (1.0 - form)
  return Gold(score=score, form=form, sentiment=sentiment, topic=topic)


def documents(n: int, seed: int, *, reviews: int) -> list[dict[str, str]]:
  """Returns n documents `{"text"}` of up to `reviews` reviews, one a line, all of one mood.

  A model that reads them learns to continue a document in its mood.
  """
  rng = random.Random(f'documents {seed}')
  return [
    {'text': _lines(rng, rng.choice(tuple(grammar.MOODS)), rng.randint(1, reviews), corrupted=0.1)}
    for _ in range(n)
  ]


def context(mood: str, seed: int, *, reviews: int) -> str:
  """Returns well-formed reviews of one mood, one a line, to put before a prompt."""
  return _lines(random.Random(f'context {seed}'), mood, reviews, corrupted=0.0)


# Generation of reviews.


def _lines(rng: random.Random, mood: str, reviews: int, *, corrupted: float) -> str:
  lines = (_review(rng, (mood,), corrupted=corrupted, off_topic=corrupted) for _ in range(reviews))
  return ''.join(f'{"".join(line)}\n' for line in lines)


def _prompt(rng: random.Random, product: str) -> str:
  return f'Review of the {product}{rng.choice(grammar.OCCASIONS)}:'


def _record(review: tuple[str, str]) -> dict[str, str]:
  return {'prompt': review[0], 'completion': review[1]}


def _review(
  rng: random.Random, moods: tuple[str, ...], *, corrupted: float, off_topic: float
) -> tuple[str, str]:
  """Returns a prompt and a response of 1 to 3 sentences, with 8 to 28 words before corruption."""
  product = rng.choice(grammar.PRODUCTS)
  mood = rng.choice(moods)
  target = rng.choice((1, 2, 2, 3))
  sentences: list[str] = []
  while len(sentences) < target or _words(sentences) < MIN_WORDS:
    subject = (
      rng.choice([p for p in grammar.PRODUCTS if p != product])
      if rng.random() < off_topic
      else product
    )
    sentence = _sentence(rng, rng.choice(grammar.MOODS[mood]), subject)
    if sentence in sentences:
      continue
    if _words([*sentences, sentence]) > MAX_WORDS:
      break
    sentences.append(_corrupt(rng, sentence) if rng.random() < corrupted else sentence)
  return _prompt(rng, product), ''.join(f' {sentence}.' for sentence in sentences)


def _words(sentences: list[str]) -> int:
  return sum(len(sentence.split()) for sentence in sentences)


def _sentence(rng: random.Random, template: str, product: str) -> str:
  """Fills a template for a product, with no filler used twice; returns it without full stop."""
  slots = grammar.SLOTS | _category_slots(_category_of(product)) | {'product': (product,)}
  used: set[str] = set()

  def fill(match: re.Match) -> str:
    choice = rng.choice([c for c in slots[match[1]] if not c or c not in used])
    if match[1] != 'is':
      used.add(choice)
    return choice

  return ' '.join(re.sub(r'\{(\w+)\}', fill, template).split())


def _corrupt(rng: random.Random, sentence: str) -> str:
  """Shuffles the words, drops one (a verb if there is any) or repeats one."""
  words = sentence.split()
  kind = rng.choice(('shuffle', 'drop', 'repeat'))
  if kind == 'shuffle':
    rng.shuffle(words)
  elif kind == 'drop':
    verbs = [i for i, word in enumerate(words) if word in grammar.VERBS]
    del words[rng.choice(verbs or range(len(words)))]
  else:
    i = rng.randrange(len(words))
    words[i:i] = [words[i]] * rng.choice((1, 1, 2))
  return ' '.join(words)


# Gold score.


def _category_of(product: str) -> grammar.Category:
  return next(category for category in grammar.CATEGORIES if product in category.products)


def _category_slots(*categories: grammar.Category) -> dict[str, tuple[str, ...]]:
  return {
    'product': tuple(x for c in categories for x in c.products),
    'feature': tuple(x for c in categories for x in c.features),
    'praise': tuple(x for c in categories for x in c.praise),
    'complaint': tuple(x for c in categories for x in c.complaint),
  }


def _product_of(prompt: str) -> str:
  for word in re.findall(r'\w+', prompt.rpartition('\n')[2]):
    if word in grammar.PRODUCTS:
      return word
  raise UserError(
    f'the gold score cannot tell what {prompt!r} is about: the prompt must name one of '
    + ', '.join(grammar.PRODUCTS)
  )


@functools.cache
def _grammar() -> tuple[re.Pattern, frozenset[tuple[str, str]]]:
  """Returns a pattern that matches the grammar's sentences, and its word pairs ("" is an end)."""
  slots = grammar.SLOTS | _category_slots(*grammar.CATEGORIES)
  patterns, pairs = [], set()
  for template in dict.fromkeys(
    grammar.POSITIVE + grammar.NEGATIVE + grammar.MIXED + grammar.NEUTRAL
  ):
    pattern, ends = '', {''}
    for piece in template.split():
      options = slots[piece[1:-1]] if piece.startswith('{') else (piece,)
      filled = [option for option in dict.fromkeys(options) if option]
      pattern += f'(?:(?:{"|".join(filled)}) ){"?" if "" in options else ""}'
      starts, ends = ends, ends if '' in options else set()
      for option in filled:
        words = option.split()
        pairs |= {(start, words[0]) for start in starts} | set(itertools.pairwise(words))
        ends = ends | {words[-1]}
    patterns.append(pattern)
    pairs |= {(end, '') for end in ends}
  return re.compile('|'.join(patterns)), frozenset(pairs)


@functools.cache
def _opinions() -> dict[tuple[str, ...], float]:
  """Returns the strength of every opinion word or phrase."""
  strengths = dict(grammar.OPINIONS)
  for category in grammar.CATEGORIES:
    strengths |= {category.praise: 1.0, category.complaint: -1.0}
  return {
    tuple(phrase.split()): strength for phrases, strength in strengths.items() for phrase in phrases
  }


@functools.cache
def _mentions() -> dict[tuple[str, ...], frozenset[str]]:
  """Returns, for each product, feature and behaviour, the products for which it is on topic."""
  products = {}
  for category in grammar.CATEGORIES:
    for phrase in category.features + category.praise + category.complaint:
      products[tuple(phrase.split())] = frozenset(category.products)
    products |= {(product,): frozenset((product,)) for product in category.products}
  return products


def _phrases(words: list[str], known: dict) -> list[tuple[int, tuple[str, ...]]]:
  """Finds known phrases without overlaps, the longest at each position; returns (index, words)."""
  matches, i = [], 0
  longest = max(map(len, known))
  while i < len(words):
    sizes = (size for size in range(longest, 0, -1) if tuple(words[i : i + size]) in known)
    size = next(sizes, 0)
    if size:
      matches.append((i, tuple(words[i : i + size])))
    i += max(size, 1)
  return matches


def _form(sentences: list[list[str]], *, finished: bool) -> float:
  pattern, pairs = _grammar()
  scores, seen = [], set()
  for words in sentences:
    sentence = ' '.join(words)
    neighbours = list(zip(['', *words], [*words, '']))
    if not words or sentence in seen:
      score = 0.0
    elif pattern.fullmatch(sentence + ' '):
      score = 1.0
    else:
      score = 0.7 * (sum(pair in pairs for pair in neighbours) / len(neighbours)) ** 2
    seen.add(sentence)
    scores.append(score)
  if not scores:
    return 0.0
  if not finished:
    scores[-1] *= 0.5
  length = sum(map(len, sentences))
  in_range = min(1.0, length / MIN_WORDS, max(0.0, 2.0 - length / MAX_WORDS))
  return in_range * sum(scores) / len(scores)


def _sentiment(sentences: list[list[str]]) -> float:
  total, seen = 0.0, set()
  for words in sentences:
    net = 0.0
    for i, phrase in _phrases(words, _opinions()):
      if phrase in seen:
        continue
      seen.add(phrase)
      strength = _opinions()[phrase]
      before = words[:i]
      if before and before[-1] in grammar.STRONGER + grammar.WEAKER:
        strength *= 1.4 if before.pop() in grammar.STRONGER else 0.6
      if before and before[-1] in grammar.NEGATIONS:
        strength *= -0.6
      net += max(-1.0, min(1.0, strength))
    total += max(-1.0, min(1.0, net))
  return total / max(len(sentences), 2)


def _mentioned(sentences: list[list[str]]) -> set[tuple[str, ...]]:
  return {phrase for words in sentences for _, phrase in _phrases(words, _mentions())}


def _topic(sentences: list[list[str]], product: str) -> float:
  mentions = _mentioned(sentences)
  right = sum(product in _mentions()[phrase] for phrase in mentions)
  return (2 * right - len(mentions)) / max(len(mentions), 2)


def write(
  folder, *, corpus_size, demonstration_count, prompt_count, eval_prompt_count, vocab_size, seed
):
  """Writes the data sets and the tokenizer of the quickstart.

  These are corpus.jsonl {"text"}, demonstrations.jsonl {"prompt", "completion"}, prompts.jsonl and
  eval_prompts.jsonl {"prompt"}, and a tokenizer trained on the corpus.

  Args:
    folder: pathlib.Path of the output folder.
    corpus_size: Number of documents.
    demonstration_count: Number of demonstrations.
    prompt_count: Number of prompts for training.
    eval_prompt_count: Number of prompts for evaluation.
    vocab_size: Vocabulary size of the tokenizer.
    seed: Random seed.
  """
  documents = corpus(corpus_size, seed)
  for name, records in {
    'corpus': documents,
    'demonstrations': demonstrations(demonstration_count, seed + 1),
    'prompts': prompts(prompt_count, seed + 2),
    'eval_prompts': prompts(eval_prompt_count, seed + 3),
  }.items():
    sources.write(folder / f'{name}.jsonl', records)
  texts = [document['text'] for document in documents]
  tokenizers.train_bpe(texts, vocab_size, str(folder / 'tokenizer'))


def write_in_moods(
  folder, *, document_count, reviews, mood, prompt_count, eval_prompt_count, vocab_size, seed
):
  """Writes the data of context distillation, and the tokenizer.

  These are corpus.jsonl {"text"}, documents of several reviews of one mood; context.txt, reviews of
  one mood to put before a prompt; prompts.jsonl and eval_prompts.jsonl {"prompt"}; the latter after
  the context, prompted.jsonl; and a tokenizer trained on the corpus.

  Args:
    folder: pathlib.Path of the output folder.
    document_count: Number of documents.
    reviews: Maximum number of reviews of a document; the context has one less.
    mood: Mood of the context, a key of grammar.MOODS.
    prompt_count: Number of prompts for training.
    eval_prompt_count: Number of prompts for evaluation.
    vocab_size: Vocabulary size of the tokenizer.
    seed: Random seed.

  Raises:
    UserError: There is no such mood.
  """
  if mood not in grammar.MOODS:
    raise UserError(f'mood={mood!r} must be one of {", ".join(grammar.MOODS)}')
  corpus = documents(document_count, seed, reviews=reviews)
  before = context(mood, seed, reviews=reviews - 1)
  questions = prompts(eval_prompt_count, seed + 3)
  for name, records in {
    'corpus': corpus,
    'prompts': prompts(prompt_count, seed + 2),
    'eval_prompts': questions,
    'prompted': [{'prompt': before + question['prompt']} for question in questions],
  }.items():
    sources.write(folder / f'{name}.jsonl', records)
  (folder / 'context.txt').write_text(before, encoding='utf-8')
  tokenizers.train_bpe([d['text'] for d in corpus], vocab_size, str(folder / 'tokenizer'))
