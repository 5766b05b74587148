"""Runs a user's function, so that however it fails the run ends with one line that says where.

An exception, an exit and a time limit that passes become a UserError with the last frames of the
user's code, and the example that their variables hold. Ctrl-C stays what it is. The working
directory stays too, and a child that the function forks never becomes a second run.
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import linecache
import os
import signal
import sys
import threading
import time
import traceback

from rlhf_jax import errors

GRACE = 60.0  # seconds after the limit at which a function that no signal reaches ends the process
MOST_FRAMES, MOST_TEXT = 3, 160
# Between the run and the user's code; the last ones are Python's import.
OURS = (
  __name__,
  'rlhf_jax.rewards.functions',
  'rlhf_jax.evaluation.evaluators',
  'rlhf_jax.evaluation.judges',
  'importlib',
  'importlib._bootstrap',
  'importlib._bootstrap_external',
)


@dataclasses.dataclass(frozen=True)
class Call:
  """What is called, for messages and the time limit.

  Attributes:
    what: such as 'the reward function length'.
    prompts: n texts that it is called with.
    responses: n texts likewise.
    timeout: seconds that the call may take; None for no limit.
    key: of the config, that holds `timeout`; '' for none.
    remedy: a last sentence of messages.
  """

  what: str
  prompts: tuple | list = ()
  responses: tuple | list = ()
  timeout: float | None = None
  key: str = ''
  remedy: str = ''


class Expired(BaseException):
  """The time limit has passed; says where. No Exception, which user code may catch."""


class Exited(BaseException):
  """os._exit was called; says how."""


def run(function, call):
  """What a function returns.

  Args:
    function: () -> anything, of user code.
    call: Call.

  Raises:
    UserError: it raised, called sys.exit or os._exit, or took longer than its limit.
  """
  try:
    # A child must not come to the end of the time limit: it would wait for a thread that it lacks.
    with same_folder(), refuse_exit(), time_limit(call), one_process(call):
      return function()
  except (KeyboardInterrupt, errors.UserError):
    raise
  except Expired as error:
    remedy = (
      f'Make it faster, or raise {call.key} (None: no limit).' if call.key else 'Make it faster.'
    )
    raise errors.UserError(
      f'{call.what} did not return within {call.timeout:g} seconds{error}. {remedy} '
      f'{call.remedy}'.rstrip()
    ) from error
  except (Exited, SystemExit) as error:
    how = error if isinstance(error, Exited) else f'sys.exit({error.code!r})'
    raise errors.UserError(
      f'{call.what} called {how}{place(error, call)}: it must return, or raise an exception. '
      f'{call.remedy}'.rstrip()
    ) from error
  except BaseException as error:  # some are no Exception, such as asyncio's CancelledError
    text = ' '.join(str(error.msg if in_file(error) else error).split())
    raise errors.UserError(
      f'{call.what} raised {type(error).__name__}: {text}{place(error, call)}. --verbosity=1 '
      f'shows all of its traceback. {call.remedy}'.rstrip()
    ) from error


def import_module(name, call):
  """The module of a name.

  Args:
    name: dotted.
    call: Call.

  Raises:
    ModuleNotFoundError: there is none of this name.
    UserError: it raised something, called sys.exit or os._exit, or took longer than its limit.
  """

  def found():
    try:
      return importlib.import_module(name), None
    except ModuleNotFoundError as error:
      if error.name and f'{name}.'.startswith(f'{error.name}.'):
        return None, error
      raise  # of another module, which this one imports

  module, missing = run(found, call)
  if missing is not None:
    raise missing
  return module


def in_file(error):
  """Whether an error is one of syntax, in a file."""
  return isinstance(error, SyntaxError) and os.path.isfile(error.filename or '')


def place(error, call):
  """Where the user's code raised an error, and with what example; begins with ', at '."""
  if in_file(error):
    line = (error.text or '').strip()
    return f', at {shorter(error.filename)}:{error.lineno or 1}' + (f': `{line}`' if line else '')
  return described(list(traceback.walk_tb(error.__traceback__)), call)


def described(stack, call):
  """The last frames of the user's code, and the example in them; '' if there is nothing to say.

  Args:
    stack: pairs (frame, line number), outermost first.
    call: Call.
  """
  frames = [(frame, line) for frame, line in stack if frame.f_globals.get('__name__') not in OURS]
  file = lambda frame: frame.f_code.co_filename
  lines = {(file(frame), line): (frame, line) for frame, line in reversed(frames)}
  lines = list(lines.values())[::-1]  # without the frames that comprehensions add
  shown = lines[-MOST_FRAMES:]
  own = [pair for pair in lines if file(pair[0]) == file(frames[0][0])]
  if own and own[-1] not in shown:  # deep in a library: the user's own line is what helps
    shown = own[-1:] + shown[1:]
  lines = [
    f'{shorter(file(frame))}:{line} in {frame.f_code.co_name}: '
    f'`{linecache.getline(file(frame), line).strip()}`'
    for frame, line in shown
  ]
  text = f', at {"; then ".join(lines)}' if lines else ''
  index = example_of([frame for frame, _ in frames], call)
  if index is not None:
    return f'{text}, with {named(index, call)}'
  if not call.prompts:
    return text
  return (
    f'{text}, called with {len(call.prompts)} prompts, the first {clipped(call.prompts[0])} '
    f'with the response {clipped(call.responses[0])}'
  )


def example_of(frames, call):
  """The number of the example that the variables of the innermost frame hold, or else None."""
  for frame in reversed(frames):
    held = {value for value in frame.f_locals.values() if isinstance(value, str) and value}
    for wanted in (
      lambda p, r: p in held and r in held,
      lambda p, r: r in held,
      lambda p, r: p in held,
    ):
      for index, pair in enumerate(zip(call.prompts, call.responses)):
        if wanted(*pair):
          return index
  return None


def named(index, call):
  """The example of a batch, for messages."""
  return (
    f'example {index}, prompt {clipped(call.prompts[index])}, response '
    f'{clipped(call.responses[index])}'
  )


def clipped(value):
  """A value's repr, shortened to a length that a line can hold."""
  text = repr(value)
  return text if len(text) <= MOST_TEXT else f'{text[: MOST_TEXT - 3]}...'


def shorter(path):
  """A path relative to the working directory if it is in there."""
  inside = os.path.relpath(path) if os.path.isabs(path) else path
  return path if inside.startswith(os.pardir) else inside


@contextlib.contextmanager
def one_process(call):
  """Ends children that the body forks and that leave it: they would go on as a second run.

  One that exits does so; one that returns or raises ends with status 1 and says so.
  """
  process, status, error = os.getpid(), 1, None
  try:
    yield
  except BaseException as found:
    error = found
    raise
  finally:
    if os.getpid() != process:
      if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
      else:
        how = f'raised {type(error).__name__}: {error}' if error else 'returned'
        text = f'{call.what} forked a process that {how}: it must end with os._exit(status)\n'
        os.write(2, text.encode())
      os._exit(status)  # without what the run has in its buffers and does at its end


@contextlib.contextmanager
def same_folder():
  """Puts the working directory back, which relative paths of the config are meant from."""
  folder = os.getcwd()
  try:
    yield
  finally:
    os.chdir(folder)


@contextlib.contextmanager
def refuse_exit():
  """Makes os._exit raise Exited in this process; in the children that user code forks it exits.

  It also exits when this package calls it, to end at once.
  """
  exit_now, process = os._exit, os.getpid()

  def refuse(status):
    caller = sys._getframe(1).f_globals.get('__name__', '')
    ours = caller.startswith('rlhf_jax.') and not caller.startswith('rlhf_jax.tasks.')
    if ours or os.getpid() != process:
      exit_now(status)
    raise Exited(f'os._exit({status})')

  os._exit = refuse
  try:
    yield
  finally:
    os._exit = exit_now


@contextlib.contextmanager
def time_limit(call):
  """Raises Expired in the main thread where the body takes longer than the limit of a Call.

  The signal is SIGALRM; a handler and a timer that were there come back. Where it cannot interrupt
  (code in C, another thread, user code with an alarm of its own), Python prints the stacks of all
  threads GRACE seconds after the limit, and ends the process with status 1.
  """
  if call.timeout is None:
    yield
    return
  limited, places = [True], []

  def expire(signum, frame):
    del signum
    if not limited:
      return
    if not places:
      stack = []
      for pair in traceback.walk_stack(frame):
        if pair[0].f_globals.get('__name__') == __name__:
          break
        stack.insert(0, pair)
      places.append(described(stack, call))
    raise Expired(places[0])

  faulthandler.dump_traceback_later(call.timeout + GRACE, exit=True, file=sys.__stderr__)
  restore = start_alarm(expire, call.timeout)
  try:
    yield
    if places:  # caught by a bare `except:`
      raise Expired(places[0])
  finally:
    limited.clear()  # first: the signal may come between any two lines
    restore()
    faulthandler.cancel_dump_traceback_later()


def start_alarm(handler, seconds):
  """Has SIGALRM call a handler after some seconds, and then every second.

  Returns:
    Function that takes it back. Off the main thread, which alone has signals, neither does anything.
  """
  if threading.current_thread() is not threading.main_thread():
    return lambda: None
  started, before = time.monotonic(), signal.signal(signal.SIGALRM, handler)
  left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)

  def restore():
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
    if left:
      signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)

  return restore
