"""Progress bars: updated in place on a terminal, and written line by line to a log file."""

import sys

from rlhf_jax import processes

LOG_SECONDS = 30  # interval between two lines in a log file
LOG_FORMAT = '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'


class Lines:
  """Stream that writes each update of a bar as a line, without carriage returns.

  tqdm begins an update with a carriage return, pads it with spaces to erase the previous one, and
  removes a bar by an empty update.
  """

  def __init__(self, stream):
    """Wraps `stream`."""
    self._stream = stream
    self.encoding = getattr(stream, 'encoding', None)

  def write(self, text):
    """Writes an update unless it is empty."""
    line = text.strip()
    if line:
      self._stream.write(f'{line}\n')

  def flush(self):
    """Flushes the stream."""
    self._stream.flush()


def display():
  """Returns keyword arguments of tqdm.tqdm for a terminal or a log file as stderr.

  Only the main process shows bars.
  """
  settings = {'disable': not processes.is_main_process(), 'file': sys.stderr, 'dynamic_ncols': True}
  if sys.stderr.isatty():
    return settings
  return settings | {
    'file': Lines(sys.stderr),
    'dynamic_ncols': False,
    'bar_format': LOG_FORMAT,
    'mininterval': LOG_SECONDS,
    'maxinterval': LOG_SECONDS,
    'miniters': 1,
  }
