"""How progress bars are drawn: in place on a terminal, as a line now and then in a log file."""

import sys

from rlhf_jax import processes

LOG_SECONDS = 30  # between two lines in a log file
LOG_FORMAT = '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'


class Lines:
  """A stream that writes each drawing of a bar as a line, without carriage returns.

  tqdm begins a drawing with a carriage return, pads it with spaces to erase the one before, and
  removes a bar by an empty drawing.
  """

  def __init__(self, stream):
    """Writes to `stream`."""
    self._stream = stream
    self.encoding = getattr(stream, 'encoding', None)

  def write(self, text):
    """Writes a drawing that shows something."""
    line = text.strip()
    if line:
      self._stream.write(f'{line}\n')

  def flush(self):
    """Flushes the stream."""
    self._stream.flush()


def display():
  """Keywords of tqdm.tqdm: the main process draws, as fits where stderr goes."""
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
