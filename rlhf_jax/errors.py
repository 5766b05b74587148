"""Errors a user can cause. Each message says what was wrong, where, and what to do."""

import errno
import os
import re

# What libraries write into messages of their own, and what is to be done.
DISK = {
  errno.ENOSPC: 'make room',
  errno.EDQUOT: 'make room, or have the quota raised',
  errno.EROFS: 'name a --workdir that can be written',
  errno.ENOTDIR: 'remove what is in the place of the folder',
  errno.EIO: 'look after the disk',
  errno.EACCES: 'change its permissions, or name another --workdir',
}


# Control characters but tab and line feed: what a terminal takes for commands.
CONTROLS = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')


class UserError(Exception):
  """Something in the command, the config or a file has to change; no bug in the code."""


class DataError(UserError):
  """A record cannot be read; the message names file, line and field."""


def need(condition, message):
  """Raises UserError with a message unless the condition holds."""
  if not condition:
    raise UserError(message)


class Interrupted(KeyboardInterrupt):
  """The run was asked to stop, by SIGTERM or Ctrl-C, and can be resumed; no `except Exception` holds it up.

  Attributes:
    status: exit status of the process, 128 + the signal's number.
  """

  def __init__(self, message, status):
    super().__init__(message)
    self.status = status


def printable(text):
  """Text for a terminal, its control characters spelled out: texts of others may hold them."""
  return CONTROLS.sub(lambda found: f'\\x{ord(found.group()):02x}', text)


def brief(text, most=200):
  """The beginning of a text that may be long."""
  return text if len(text) <= most else f'{text[:most]}... ({len(text)} characters)'


def of_disk(error):
  """What a file system's error says, in one line; None for an error of another kind."""
  while error is not None:
    for number, remedy in DISK.items():
      text = os.strerror(number)
      if getattr(error, 'errno', None) == number or text in str(error):
        place = getattr(error, 'filename', None) or re.search(r'(?<=")/[^"]+|$', str(error)).group()
        return f'{text}{f" ({place})" if place else ""}: {remedy}; the same command resumes from the last checkpoint'
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return None
