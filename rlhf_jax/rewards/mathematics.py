"""Rewards for answers in mathematics, by Math-Verify (https://github.com/huggingface/Math-Verify).

The final answer of a response is the last boxed one, else the one that an "answer is" announces,
else the last formula or number. It is right if it equals the reference as an expression: 1/2 is
0.5, and (x + 1)^2 is x^2 + 2 x + 1.

Math-Verify parses and simplifies what a model writes, and some texts keep it busy forever. Its own
time limits use signals of the main thread. We switch them off and let worker processes, which can
be killed, limit the time: set config.reward.workers.
"""

import functools
import logging

from rlhf_jax import errors

try:
  import math_verify
except ImportError as error:
  raise errors.UserError(
    f"rewards for mathematics need the extra 'math' ({error}): pip install 'rlhf_jax[math]'"
  ) from error

for name in ('parser', 'grader'):  # they warn that there is no time limit
  logging.getLogger(f'math_verify.{name}').setLevel(logging.ERROR)

COLUMN = 'answer'  # column of the prompt's record with the reference


def correct(prompts, responses, *, metadata):
  """Returns 1 for each response whose final answer equals the column `answer`, else 0."""
  del prompts
  return [
    float(equals(entry[COLUMN], response))
    for response, entry in zip(responses, metadata, strict=True)
  ]


correct.needs_workers = True  # see host.validate


def equals(reference, response):
  """Returns whether the final answer of a response equals a reference.

  Args:
    reference: Expression in LaTeX, such as '72' or '\\frac{1}{2}'; or a text that contains it
      between dollar signs or in \\boxed{}.
    response: Text.

  Raises:
    UserError: There is no expression in the reference.
  """
  expected = _reference(str(reference))
  return math_verify.verify(expected, parse(response), timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _reference(text):
  """Returns the parsed reference."""
  parsed = parse(text if '$' in text or '\\boxed' in text else f'${text}$')
  errors.need(
    parsed,
    f'column {COLUMN!r} of a prompt holds {text!r}, which is not an expression: write it in LaTeX',
  )
  return parsed


def parse(text):
  """Returns the final answer of a text, [SymPy expression, its text], or [] if there is none."""
  return math_verify.parse(text, parsing_timeout=None)
