"""Rule-based rewards over strings; see functions.py for what they are called with."""

import re

_SENTENCE = re.compile(r'[^.!?]+[.!?]+["\')\]]*')


def direct_speech(prompts, responses, *, response_tokens, metadata):
  """Share of a response's finished sentences that contain a quotation mark, in [0, 1]."""
  del prompts, response_tokens, metadata
  return [_share(_SENTENCE.findall(text)) for text in responses]


def _share(sentences):
  return sum('"' in s for s in sentences) / len(sentences) if sentences else 0.0


def direct_speech_of(prompt, response):
  """`direct_speech` of one response, for the evaluation."""
  return direct_speech([prompt], [response], response_tokens=None, metadata=None)[0]
