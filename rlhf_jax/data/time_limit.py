"""A time limit for Python code that may never end, in any thread."""

from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import threading
import time

POLL = 0.25  # seconds


class Exceeded(Exception):
  """The body of `seconds` took too long."""


@dataclasses.dataclass
class _Body:
  polls: int  # polls left until the limit
  stopped: bool = False


_lock = threading.Lock()
_bodies: dict[int, _Body] = {}
_watcher: list[threading.Thread] = []


@contextlib.contextmanager
def seconds(limit: float) -> Iterator[None]:
  """Raises Exceeded in the body, between two bytecodes, when it has run for too long.

  A single call into C, such as multiplying a string by a large number, is not interrupted. The
  limit is accurate to a quarter of a second. Time while the process is suspended does not count.

  Args:
    limit: Time limit in seconds.
  """
  thread, body = threading.get_ident(), _Body(int(limit / POLL) + 1)
  with _lock:
    _bodies[thread] = body
    if not (_watcher and _watcher[0].is_alive()):  # a forked process has no watcher
      _watcher[:] = [threading.Thread(target=_watch, daemon=True)]
      _watcher[0].start()
  try:
    yield
  finally:
    with _lock:
      _bodies.pop(thread, None)
    if body.stopped:
      time.sleep(2 * POLL)  # the exception may still be pending, and must not be raised outside


def _watch() -> None:
  while True:
    time.sleep(POLL)
    with _lock:
      for thread, body in list(_bodies.items()):
        body.polls -= 1
        if body.polls < 0:
          body.stopped = True
          del _bodies[thread]
          ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(Exceeded)
          )
