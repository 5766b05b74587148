"""Prompts from running text: windows of documents that start after and end with given strings."""

from collections.abc import Sequence
import pathlib

from absl import logging
import numpy as np

from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

NO_START = 'no start_text, or nothing after it'
NO_END = 'no end_text within the window'


def write(
  folder: pathlib.Path,
  *,
  path: str,
  tokenizer: str,
  length: int,
  start_text: str | None,
  end_text: str | None,
  prefix: str,
  suffix: str,
  held_out: int,
) -> None:
  """Writes queries as prompts.jsonl and held_out.jsonl, {"prompt"}: a stage of a pipeline.

  Args:
    folder: Folder of the two files.
    path: Data set of documents.
    tokenizer: Folder of a tokenizer, or of a model with its tokenizer.
    length: See `queries`; prefix and suffix do not count.
    start_text: See `queries`.
    end_text: See `queries`.
    prefix: Text before each query, such as 'Article:\\n\\n'.
    suffix: Text after each query, such as '\\n\\nTL;DR:'.
    held_out: The number of queries for evaluation, the first ones. Queries equal to one of them
      are not among the prompts.

  Raises:
    UserError: No query is left for training, or see `queries`.
  """
  loaded = tokenizers.load(tokenizer)
  examples, _ = formats.texts(sources.read(path), tokenizer=loaded)
  documents = [e if isinstance(e, str) else e.prompt + e.completion for e in examples]
  chosen, report = queries(
    documents, loaded, length=length, start_text=start_text, end_text=end_text
  )
  logging.info('queries: %s', report)
  texts = [prefix + query.prompt + suffix for query in chosen]
  known = set(texts[:held_out])
  rest = [text for text in texts[held_out:] if text not in known]
  if not rest:
    raise UserError(
      f'all {len(chosen)} queries are held out (held_out={held_out}): provide more texts.'
    )
  sources.write(folder / 'held_out.jsonl', [{'prompt': text} for text in texts[:held_out]])
  sources.write(folder / 'prompts.jsonl', [{'prompt': text} for text in rest])


def queries(
  texts: Sequence[str],
  tokenizer: formats.Tokenizer,
  *,
  length: int,
  start_text: str | None,
  end_text: str | None,
) -> tuple[list[formats.Prompt], formats.Report]:
  """Takes one query from each document, as lm-human-preferences does.

  The query starts after the first `start_text`, has at most `length` tokens, and ends with the last
  `end_text` among these. Both are matched as tokens: GPT-2's '.' does not match in '...'.
  See `tf_dataset` in lm_human_preferences/language/datasets.py of
  https://github.com/openai/lm-human-preferences.

  Where we differ:
  - Queries are texts, which are tokenized again. The tokens can differ from the document's if the
    cut is inside a word. If they exceed `length`, the query ends earlier, at an `end_text` if there
    is one to end with.
  - A document that ends with its first `start_text` is left out; they use it from its beginning.
  - `start_text` and `end_text` may have several tokens each; theirs have one.
  - `length` includes the BOS if the tokenizer adds one; GPT-2's does not.
  - Shorter queries are padded on the left, by `pipelines.prompt_iterator`; theirs on the right.
  - There are no `query_prefix` and `query_suffix`: add them to the returned prompts.

  Args:
    texts: Documents.
    tokenizer: Tokenizer, as `tokenizers.load` returns it.
    length: Maximum number of tokens of a query; `config.data.max_prompt_length`.
    start_text: Text before the query; None starts at the beginning of the document.
    end_text: Text that the query ends with; None ends anywhere.

  Returns:
    (prompts without metadata, in the order of the documents; Report of the documents left out).

  Raises:
    UserError: No document is left, or `start_text` or `end_text` has no tokens.
  """
  start, end = (
    _tokens(tokenizer, name, text)
    for name, text in (('start_text', start_text), ('end_text', end_text))
  )
  room = length - len(tokenizers.encode(tokenizer, [''])[0])  # without BOS
  prompts, left_out = [], {}
  for number, (text, (ids, behind)) in enumerate(zip(texts, tokenizers.spans(tokenizer, texts))):
    first = 0 if start is None else _first(ids, start)
    query, reason = None, NO_START
    if first is not None and first < len(ids):
      begin, reason = int(behind[first - 1]) if first else 0, NO_END
      query = _query(text, begin, ids[first : first + room], behind[first:], tokenizer, end, length)
    if query is None:
      left_out.setdefault(reason, []).append(f'text {number}')
    else:
      prompts.append(formats.Prompt(query, {}))
  report = formats.Report(
    len(texts), {reason: tuple(places) for reason, places in left_out.items()}
  )
  if not prompts:
    raise UserError(f'no text gives a query of {length} tokens: {report}')
  return prompts, report


def _query(
  text: str,
  begin: int,
  ids: np.ndarray,
  behind: np.ndarray,
  tokenizer: formats.Tokenizer,
  end: np.ndarray | None,
  length: int,
) -> str | None:
  """Returns the longest query in a window that ends with `end` and fits; None if there is none.

  Args:
    text: Document.
    begin: Number of characters before the window.
    ids: Tokens of the window.
    behind: Number of characters of the document up to the end of each token.
    tokenizer: Tokenizer.
    end: Ids that the query must end with, or None.
    length: Maximum number of tokens.
  """
  counts = range(1, len(ids) + 1) if end is None else _ends(ids, end)
  for count in reversed(counts):
    query = text[begin : behind[count - 1]]
    if query and len(tokenizers.encode(tokenizer, [query])[0]) <= length:
      return query
  return None


def _tokens(tokenizer: formats.Tokenizer, name: str, text: str | None) -> np.ndarray | None:
  if text is None:
    return None
  (ids,) = tokenizers.encode_continuation(tokenizer, [text])
  if not len(ids):
    raise UserError(f'{name} {text!r} has no tokens. Use None for no rule.')
  return ids


def _ends(ids: np.ndarray, part: np.ndarray) -> list[int]:
  """Returns the number of tokens up to the end of each occurrence of `part` in `ids`, sorted."""
  places = np.flatnonzero(ids == part[-1]) + 1
  return [
    int(place)
    for place in places
    if place >= len(part) and np.array_equal(ids[place - len(part) : place], part)
  ]


def _first(ids: np.ndarray, part: np.ndarray) -> int | None:
  """Returns the number of tokens up to the end of the first occurrence of `part`, or None."""
  return next(iter(_ends(ids, part)), None)
