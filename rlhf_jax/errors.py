"""Errors a user can cause. Each message says what was wrong, where, and what to do."""

import errno
import os
import re

# What to do about an error of the file system.
DISK_REMEDIES = {
  errno.ENOSPC: 'free some space',
  errno.EDQUOT: 'free some space, or ask for a larger quota',
  errno.EROFS: 'name a --workdir that can be written',
  errno.ENOTDIR: 'remove the file that has the name of a folder',
  errno.EIO: 'check the disk',
  errno.EACCES: 'change its permissions, or name another --workdir',
}


# Control characters except tab and line feed: a terminal may interpret them as commands.
CONTROL_CHARACTERS = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')


class UserError(Exception):
  """A mistake in the command, the config or a file, not a bug in the code."""


class DataError(UserError):
  """A record that cannot be read; the message names the file, line and field."""


class BatchError(UserError):
  """A batch cannot be made, as when a reward fails; nothing has changed since the batch before."""


def need(condition, message):
  """Raises UserError with `message` unless `condition` is true."""
  if not condition:
    raise UserError(message)


class Interrupted(KeyboardInterrupt):
  """SIGTERM or Ctrl-C stopped the run, which can be resumed.

  It is a KeyboardInterrupt so that `except Exception` does not catch it.

  Attributes:
    status: Exit status of the process: 128 + the number of the signal.
  """

  def __init__(self, message, status):
    super().__init__(message)
    self.status = status


def printable(text):
  """Returns text that is safe to print: control characters, which data may hold, are escaped."""
  return CONTROL_CHARACTERS.sub(lambda match: f'\\x{ord(match.group()):02x}', text)


def brief(text, max_length=200):
  """Returns the text, cut after `max_length` characters."""
  if len(text) <= max_length:
    return text
  return f'{text[:max_length]}... ({len(text)} characters)'


def explain_disk_error(error):
  """Returns one line about an error of the file system and its remedy; None for other errors.

  Some libraries put the system's text into a message of their own, so the text is searched too.
  """
  while error is not None:
    for number, remedy in DISK_REMEDIES.items():
      text = os.strerror(number)
      if getattr(error, 'errno', None) == number or text in str(error):
        path = getattr(error, 'filename', None) or re.search(r'(?<=")/[^"]+|$', str(error)).group()
        where = f' ({path})' if path else ''
        return f'{text}{where}: {remedy}; the same command resumes from the last checkpoint'
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return None
