"""Runs user code so that any failure ends the run with a one-line message that shows where.

Exceptions, exits and timeouts become a UserError with the last frames of the user's code and the
example that their variables hold. KeyboardInterrupt is passed on. The working directory is
restored, and child processes that the user's code forks cannot continue as a second run.
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

GRACE = 60.0  # seconds after the time limit until a call that no signal can stop ends the process
MAX_FRAMES, MAX_TEXT = 3, 160  # frames shown in a message; characters shown of a value
# Modules between the run and the user's code, which messages leave out.
INTERNAL_MODULES = (
  __name__,
  'rlhf_jax.rewards.functions',
  'rlhf_jax.rewards.worker',
  'rlhf_jax.evaluation.evaluators',
  'rlhf_jax.evaluation.judges',
  'importlib',
  'importlib._bootstrap',
  'importlib._bootstrap_external',
)


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of user code: its time limit and what messages about it need.

  Attributes:
    what: description, such as 'the reward function length'.
    prompts: n prompts of the call.
    responses: n responses of the call.
    timeout: time limit in seconds; None for no limit.
    key: config key that sets `timeout`; '' if none does.
    remedy: last sentence of messages.
    first: index in its batch of the first example of the call.
  """

  what: str
  prompts: tuple | list = ()
  responses: tuple | list = ()
  timeout: float | None = None
  key: str = ''
  remedy: str = ''
  first: int = 0


class Expired(BaseException):
  """The time limit has passed. A BaseException, because user code may catch Exception."""


class Exited(BaseException):
  """User code called os._exit."""


def run(function, call):
  """Calls a function of user code.

  Args:
    function: Function without arguments.
    call: Call.

  Returns:
    The result of the function.

  Raises:
    UserError: It raised, called sys.exit or os._exit, or exceeded the time limit.
  """
  try:
    # `one_process` is innermost: a forked child must not leave `time_limit`, which would wait for a
    # thread that only the parent has.
    with restore_directory(), refuse_exit(), time_limit(call), one_process(call):
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
      f'{call.what} called {how}{location(error, call)}: it must return, or raise an exception. '
      f'{call.remedy}'.rstrip()
    ) from error
  except BaseException as error:  # includes asyncio's CancelledError, which is not an Exception
    text = ' '.join(str(error.msg if is_syntax_error(error) else error).split())
    raise errors.UserError(
      f'{call.what} raised {type(error).__name__}: {text}{location(error, call)}. --verbosity=1 '
      f'shows the full traceback. {call.remedy}'.rstrip()
    ) from error


def import_module(name, call):
  """Imports a module of user code.

  Args:
    name: Dotted name.
    call: Call.

  Returns:
    The module.

  Raises:
    ModuleNotFoundError: There is no module of this name.
    UserError: The module raised, called sys.exit or os._exit, or exceeded the time limit.
  """

  def import_or_error():
    try:
      return importlib.import_module(name), None
    except ModuleNotFoundError as error:
      if error.name and f'{name}.'.startswith(f'{error.name}.'):
        return None, error
      raise  # The module imports another one, which does not exist.

  module, missing = run(import_or_error, call)
  if missing is not None:
    raise missing
  return module


def is_syntax_error(error):
  """Returns whether an error is a syntax error in a file."""
  return isinstance(error, SyntaxError) and os.path.isfile(error.filename or '')


def location(error, call):
  """Returns where user code raised an error and on which example, as text that starts with ', '."""
  if is_syntax_error(error):
    line = (error.text or '').strip()
    return f', at {relative_path(error.filename)}:{error.lineno or 1}' + (
      f': `{line}`' if line else ''
    )
  return describe_stack(list(traceback.walk_tb(error.__traceback__)), call)


def describe_stack(stack, call):
  """Returns the last frames of user code and the example that they work on, as text.

  Args:
    stack: Pairs (frame, line number), outermost first.
    call: Call.

  Returns:
    Text that starts with a comma; '' if there are no frames and no example.
  """
  frames = [
    (frame, line)
    for frame, line in stack
    if frame.f_globals.get('__name__') not in INTERNAL_MODULES
  ]
  file = lambda frame: frame.f_code.co_filename
  lines = {(file(frame), line): (frame, line) for frame, line in reversed(frames)}
  lines = list(lines.values())[::-1]  # one frame per line: comprehensions have their own frames
  shown = lines[-MAX_FRAMES:]
  in_user_file = [pair for pair in lines if file(pair[0]) == file(frames[0][0])]
  # If the error is deep in a library, show the user's own line too.
  if in_user_file and in_user_file[-1] not in shown:
    shown = in_user_file[-1:] + shown[1:]
  lines = [
    f'{relative_path(file(frame))}:{line} in {frame.f_code.co_name}: '
    f'`{linecache.getline(file(frame), line).strip()}`'
    for frame, line in shown
  ]
  text = f', at {"; then ".join(lines)}' if lines else ''
  index = find_example([frame for frame, _ in frames], call)
  if index is not None:
    return f'{text}, with {describe_example(index, call)}'
  if not call.prompts:
    return text
  return (
    f'{text}, called with {len(call.prompts)} prompts, the first {shortened(call.prompts[0])} '
    f'with the response {shortened(call.responses[0])}'
  )


def find_example(frames, call):
  """Returns the index of the example whose texts are in variables of the frames, or None.

  Inner frames are searched first. In each, an example whose prompt and response are both found is
  preferred, then one whose response is found, then one whose prompt is found. The only example of a
  call needs no search.
  """
  if len(call.prompts) == 1:
    return 0
  for frame in reversed(frames):
    values = {value for value in frame.f_locals.values() if isinstance(value, str) and value}
    for matches in (
      lambda p, r: p in values and r in values,
      lambda p, r: r in values,
      lambda p, r: p in values,
    ):
      for index, pair in enumerate(zip(call.prompts, call.responses)):
        if matches(*pair):
          return index
  return None


def describe_example(index, call):
  """Returns the index, prompt and response of an example, as text."""
  return (
    f'example {call.first + index}, prompt {shortened(call.prompts[index])}, response '
    f'{shortened(call.responses[index])}'
  )


def shortened(value):
  """Returns the repr of a value, cut to MAX_TEXT characters."""
  text = repr(value)
  return text if len(text) <= MAX_TEXT else f'{text[: MAX_TEXT - 3]}...'


def relative_path(path):
  """Returns a path relative to the working directory if it is inside, else the path itself."""
  relative = os.path.relpath(path) if os.path.isabs(path) else path
  return path if relative.startswith(os.pardir) else relative


@contextlib.contextmanager
def one_process(call):
  """Ends a forked child process when it leaves the `with` block, so that it is no second run.

  A child that calls sys.exit ends with its status. A child that returns or raises ends with status
  1 and prints an error.
  """
  process, status, error = os.getpid(), 1, None
  try:
    yield
  except BaseException as raised:
    error = raised
    raise
  finally:
    if os.getpid() != process:
      if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
      else:
        how = f'raised {type(error).__name__}: {error}' if error else 'returned'
        text = f'{call.what} forked a process that {how}: it must end with os._exit(status)\n'
        os.write(2, text.encode())
      os._exit(status)  # sys.exit would flush the run's buffers and call its exit handlers.


@contextlib.contextmanager
def restore_directory():
  """Restores the working directory on exit, because paths in the config are relative to it."""
  folder = os.getcwd()
  try:
    yield
  finally:
    os.chdir(folder)


@contextlib.contextmanager
def refuse_exit():
  """Makes os._exit raise Exited in this process if user code calls it.

  It still exits in child processes and if this package calls it.
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
  """Raises Expired in the main thread if the `with` block exceeds the time limit of a Call.

  This uses SIGALRM and restores the previous handler and timer. If SIGALRM cannot interrupt the
  block (code in C, another thread, user code that sets its own alarm), then GRACE seconds after the
  limit Python prints the stacks of all threads and ends the process with status 1.
  """
  if call.timeout is None:
    yield
    return
  active, locations = [True], []

  def expire(signum, frame):
    del signum
    if not active:
      return
    if not locations:
      stack = []
      for pair in traceback.walk_stack(frame):
        if pair[0].f_globals.get('__name__') == __name__:
          break
        stack.insert(0, pair)
      locations.append(describe_stack(stack, call))
    raise Expired(locations[0])

  faulthandler.dump_traceback_later(call.timeout + GRACE, exit=True, file=sys.__stderr__)
  restore = start_alarm(expire, call.timeout)
  try:
    yield
    if locations:  # A bare `except:` caught Expired.
      raise Expired(locations[0])
  finally:
    active.clear()  # first, because the signal may arrive between any two lines
    restore()
    faulthandler.cancel_dump_traceback_later()


def start_alarm(handler, seconds):
  """Makes SIGALRM call a handler after some seconds, and then every second.

  Returns:
    Function that restores the previous handler and timer. Outside the main thread, which alone
    receives signals, both do nothing.
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
