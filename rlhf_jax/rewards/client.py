"""Rewards from a server: a reward function that asks one over HTTP. See server.py for a server.

A request is a POST to the URL with a JSON object of three lists of equal length,

    {"prompts": [text, ...], "responses": [text, ...], "metadata": [{...}, ...]}

where `metadata` holds the other columns of each prompt's record. The answer has one number per
response, or null for a reward that is NaN:

    {"scores": [0.5, ...]}

A request without an answer is repeated, after pauses that double each time: if there is no
connection, if the answer takes too long, and for the statuses 429 (too many requests) and 5xx (the
server is broken or restarts). Scores are taken from one complete answer to a request; the results
of earlier tries are dropped. An answer that has another form stops the run at once.
"""

import dataclasses
import functools
import json

from absl import logging

from rlhf_jax import errors
from rlhf_jax.config import need
from rlhf_jax.rewards import guard

TIMEOUT, ATTEMPTS = 60.0, 8
LONGEST_PAUSE = 30.0  # seconds
TOO_MANY_REQUESTS = 429


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the requests to a server.

  Attributes:
    size: responses per request; None for all.
    timeout: seconds that a request may take.
    attempts: tries of a request, the first included.
    first_pause: seconds before the second try; later pauses double up to LONGEST_PAUSE.
  """

  size: int | None = None
  timeout: float | None = TIMEOUT
  attempts: int = ATTEMPTS
  first_pause: float = 0.5


class NoAnswer(Exception):
  """The server did not answer this time, but may later."""


def packages(key):
  """Returns the packages httpx and tenacity.

  Raises:
    UserError: They are not installed; the message names the config key that needs them.
  """
  try:
    import httpx
    import tenacity
  except ImportError as error:
    raise errors.UserError(
      f"{key} needs the extra 'http' ({error}): pip install 'rlhf_jax[http]'"
    ) from error
  return httpx, tenacity


def validate(url, key):
  """Raises UserError if an address is not an HTTP URL, or if a package is missing."""
  httpx, _ = packages(key)
  try:
    valid = httpx.URL(url).scheme in ('http', 'https') and httpx.URL(url).host
  except httpx.InvalidURL:
    valid = False
  need(valid, f"{key}={url!r} must be an address such as 'http://localhost:8000'")


def reward(url, settings=Settings(), *, key='config.reward'):
  """Returns the reward function of a server; see functions.py.

  Args:
    url: Address of the server.
    settings: Settings.
    key: Dotted name of the config block of the server, or name of an option, for messages.

  Returns:
    Function (prompts, responses, *, response_tokens, metadata) -> scores. It raises UserError if
    the server does not answer, or not in the form described above.
  """
  httpx, tenacity = packages(f'{key}.url')
  client = httpx.Client(timeout=settings.timeout)
  retrying = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(NoAnswer),
    stop=tenacity.stop_after_attempt(settings.attempts),
    wait=tenacity.wait_exponential(multiplier=settings.first_pause, max=LONGEST_PAUSE),
    before_sleep=lambda state: logging.warning(
      'the reward server %s: try %d of %d: %s',
      url,
      state.attempt_number,
      settings.attempts,
      state.outcome.exception(),
    ),
    reraise=True,
  )

  # A key of the command line has no keys below it.
  names = f'{key}.attempts and {key}.request_timeout'
  waits = f'; {names} set how long the run waits for it' if '.' in key else ''

  def score(prompts, responses, *, response_tokens, metadata):
    del response_tokens
    scores, size = [], settings.size or len(prompts)
    for start in range(0, len(prompts), size):
      part = slice(start, start + size)
      body = encode(prompts[part], responses[part], metadata[part], url)
      try:
        answer = retrying(functools.partial(ask, client, url, body))
      except NoAnswer as error:
        raise errors.UserError(
          f'the reward server {url} gave no answer in {settings.attempts} tries; the last: '
          f'{error}. Once it runs, the same command resumes{waits}.'
        ) from error
      scores += scores_of(answer, len(prompts[part]), url)
    return scores

  score.__name__ = f'of the server {url}'
  return score


def encode(prompts, responses, metadata, url):
  """Returns the body of a request.

  Raises:
    UserError: The metadata of a prompt cannot be written as JSON.
  """
  body = {'prompts': list(prompts), 'responses': list(responses), 'metadata': list(metadata)}
  try:
    return json.dumps(body, allow_nan=False).encode()
  except (TypeError, ValueError) as error:
    raise errors.UserError(
      f'the metadata of the prompts cannot be sent to the reward server {url} as JSON ({error}). '
      'Remove or convert such columns of config.data.path.'
    ) from error


def ask(client, url, body):
  """Sends a request and returns the httpx.Response of a server that has understood it.

  Raises:
    NoAnswer: There was none, or one that may change when the request is repeated.
    UserError: The server refused the request.
  """
  import httpx

  try:
    response = client.post(url, content=body, headers={'Content-Type': 'application/json'})
  except httpx.TimeoutException as error:
    raise NoAnswer(f'no answer within {client.timeout.read:g} seconds') from error
  except httpx.RequestError as error:
    raise NoAnswer(f'{type(error).__name__}: {error}') from error
  status = f'status {response.status_code}'
  if response.text:
    status += f', {guard.shortened(response.text)}'
  if response.status_code == TOO_MANY_REQUESTS or response.is_server_error:
    raise NoAnswer(status)
  if not response.is_success:
    raise errors.UserError(
      f'the reward server {url} refused the request: {status}. It must accept a POST in the form '
      'that docs/rewards.md describes.'
    )
  return response


def scores_of(response, count, url):
  """Reads the scores of a request.

  Args:
    response: httpx.Response.
    count: Number of responses in the request.
    url: Address of the server, for messages.

  Returns:
    List of `count` values; NaN for null. functions.call checks that they are numbers.

  Raises:
    UserError: The answer does not have the form described at the top of the file.
  """
  try:
    scores = response.json()['scores']
    if not isinstance(scores, list):
      raise TypeError('scores is not a list')
  except (ValueError, LookupError, TypeError) as error:
    raise errors.UserError(
      f'the reward server {url} answered {guard.shortened(response.text)}, but '
      f'{{"scores": [...]}} with {count} numbers was expected ({type(error).__name__}: {error})'
    ) from error
  if len(scores) != count:
    raise errors.UserError(
      f'the reward server {url} answered {len(scores)} scores for {count} responses: it must give '
      'one for each'
    )
  return [float('nan') if score is None else score for score in scores]
