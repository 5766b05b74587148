"""The messages between live.py and its process, live_worker.py."""

from typing import Any, NamedTuple

from rlhf_jax import errors

Prompt = str | list[dict[str, str]]


class Setup(NamedTuple):
  """The first message to the process; see `live.Policies` for the fields."""

  folders: dict[str, str]
  max_concurrent: int
  max_length: int
  chat_template: str | None


class Ask(NamedTuple):
  """A message to the process: write an answer."""

  id: int
  policy: str
  prompt: Prompt
  max_new_tokens: int | None
  temperature: float
  seed: int


class Cancel(NamedTuple):
  """A message to the process: nobody waits for this answer any more."""

  id: int


class Alive(NamedTuple):
  """A message from the process, which it sends every few seconds unless it hangs."""


class Begun(NamedTuple):
  """A message from the process: which checkpoint answers, with which sampling settings."""

  id: int
  checkpoint: str
  sampling: dict[str, Any]


class Piece(NamedTuple):
  """A message from the process: text; `finish` is None, or why the answer ends with it."""

  id: int
  text: str
  finish: str | None


class Failed(NamedTuple):
  """A message from the process, or about it: why there is no answer, and the error to raise."""

  id: int
  text: str
  error: type[errors.UserError] = errors.UserError
