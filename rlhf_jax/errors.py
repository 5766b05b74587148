"""Errors a user can cause. Each message says what was wrong, where, and what to do."""


class UserError(Exception):
  """Something in the command, the config or a file has to change; no bug in the code."""


class DataError(UserError):
  """A record cannot be read; the message names file, line and field."""
