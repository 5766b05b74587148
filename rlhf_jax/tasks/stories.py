"""Stories with direct speech: prompts, and a reward for sentences with quotations."""

import re

from rlhf_jax.data import sources

_SENTENCE = re.compile(r'[^.!?]+[.!?]+["\')\]]*')


def write(folder, *, texts, count):
  """Writes prompts.jsonl with `count` prompts, which repeat the texts in turn.

  Args:
    folder: pathlib.Path of the output folder.
    texts: Distinct prompts.
    count: Number of records.
  """
  sources.write(folder / 'prompts.jsonl', [{'prompt': texts[i % len(texts)]} for i in range(count)])


def direct_speech(prompts, responses, *, response_tokens, metadata):
  """Returns, for each response, the fraction of finished sentences with a quotation mark."""
  del prompts, response_tokens, metadata
  return [_quoting(_SENTENCE.findall(text)) for text in responses]


def _quoting(sentences):
  return sum('"' in s for s in sentences) / len(sentences) if sentences else 0.0


def direct_speech_of(prompt, response):
  """Returns `direct_speech` of one response, as a gold score."""
  return direct_speech([prompt], [response], response_tokens=None, metadata=None)[0]
