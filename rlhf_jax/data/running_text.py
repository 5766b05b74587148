"""Prompts out of running text: windows of documents that start after and end with given texts."""

from collections.abc import Sequence
import pathlib

from absl import logging
import numpy as np

from rlhf_jax.data import formats
from rlhf_jax.data import sources
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError

NO_START = 'no start_text, or nothing behind it'
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
  """A stage of a pipeline: writes queries as prompts.jsonl and held_out.jsonl, {"prompt"}.

  Args:
    folder: where they go.
    path: data set of documents.
    tokenizer: folder, or one of a model with its tokenizer.
    length: see `queries`; prefix and suffix are not counted.
    start_text: likewise.
    end_text: likewise.
    prefix: in front of each query, such as 'Article:\\n\\n'.
    suffix: behind each query, such as '\\n\\nTL;DR:'.
    held_out: queries for evaluation, the first ones; equal ones are not among the prompts.

  Raises:
    UserError: no query is left for training, or see `queries`.
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
    raise UserError(f'{len(chosen)} queries, and {held_out} of them are held out: give more texts.')
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

  The query is what follows the first `start_text`, at most `length` tokens of it, up to and with
  the last `end_text` among these. Both are matched as tokens: GPT-2's '.' is not found in '...'.
  See `tf_dataset` in lm_human_preferences/language/datasets.py of
  https://github.com/openai/lm-human-preferences.

  Where we differ:
  - Queries are texts, which are tokenized anew. Those tokens can differ from the document's where
    it is cut inside of a word. If they exceed `length`, the query ends earlier, at an `end_text`
    where that is asked for.
  - A document that ends with its first `start_text` is left out; there it is taken from its start.
  - `start_text` and `end_text` may be several tokens each; there they are one.
  - `length` includes the BOS where the tokenizer begins texts with one; GPT-2's does not.
  - Shorter queries are padded on the left, by `pipelines.prompt_iterator`; there on the right.
  - There is no `query_prefix` and `query_suffix`: put these around the prompts that come back.

  Args:
    texts: documents.
    tokenizer: as `tokenizers.load` gives it.
    length: tokens of a query, at most; `config.data.max_prompt_length`.
    start_text: None starts with the document.
    end_text: None ends anywhere.

  Returns:
    (prompts without metadata in the documents' order, what was left out and why).

  Raises:
    UserError: no document is left, or `start_text` or `end_text` is no token.
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
  """The longest part of a window that may end where it does and fits, or None.

  Args:
    text: the document.
    begin: characters before the window.
    ids: tokens of the window.
    behind: characters of the document up to the end of each.
    tokenizer: its tokenizer.
    end: ids that a query ends with, or None.
    length: tokens that it has at most.
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
    raise UserError(f'{name} {text!r} is no token. Use None for no rule.')
  return ids


def _ends(ids: np.ndarray, part: np.ndarray) -> list[int]:
  """Tokens up to the end of each place where `part` stands in `ids`, in rising order."""
  places = np.flatnonzero(ids == part[-1]) + 1
  return [
    int(place)
    for place in places
    if place >= len(part) and np.array_equal(ids[place - len(part) : place], part)
  ]


def _first(ids: np.ndarray, part: np.ndarray) -> int | None:
  """Tokens up to the end of the first place where `part` stands in `ids`; None without one."""
  return next(iter(_ends(ids, part)), None)
