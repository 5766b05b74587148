"""Stories with direct speech: prompts from a few texts, and the share of sentences that quote somebody."""

import re

from rlhf_jax.data import sources

_SENTENCE = re.compile(r'[^.!?]+[.!?]+["\')\]]*')


def write(folder, *, texts, count):
  """Writes prompts.jsonl: `count` prompts that take the texts in turn.

  Args:
    folder: pathlib.Path it goes to.
    texts: what the prompts are.
    count: records.
  """
  sources.write(folder / 'prompts.jsonl', [{'prompt': texts[i % len(texts)]} for i in range(count)])


def direct_speech(prompts, responses, *, response_tokens, metadata):
  """Share of a response's finished sentences that contain a quotation mark, in [0, 1]."""
  del prompts, response_tokens, metadata
  return [_share(_SENTENCE.findall(text)) for text in responses]


def _share(sentences):
  return sum('"' in s for s in sentences) / len(sentences) if sentences else 0.0


def direct_speech_of(prompt, response):
  """`direct_speech` of one response, for the evaluation."""
  return direct_speech([prompt], [response], response_tokens=None, metadata=None)[0]
