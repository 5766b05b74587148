"""Files made from a data file, such as an index of its lines, and kept for the next start.

They lie beside the data as hidden files, or in the user's cache where that folder cannot be
written. Their names hold a fingerprint of the data, so one made of other contents is never read.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import pathlib

from rlhf_jax.errors import UserError

SAMPLES = 32  # blocks of the data that the fingerprint reads
BLOCK = 4096  # bytes of each


def file(source: str, kind: str, make: Callable[[str], None]) -> str:
  """The path of a file made from another, which is made first where it is not there.

  Of several processes on one machine one makes it and the others wait.

  Args:
    source: path of the data.
    kind: what it is, its suffix; with a version where what is in it may change.
    make: (path) writes it.

  Raises:
    UserError: it can be written neither beside the data nor in the cache.
  """
  name = f'{fingerprint(source)}.{kind}'
  folder, base = os.path.split(os.path.abspath(source))
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  owner = hashlib.sha256(folder.encode()).hexdigest()[:16]
  places = [
    os.path.join(folder, f'.{base}.'),
    os.path.join(cache, 'rlhf_jax', 'data', f'{owner}.{base}.'),
  ]
  with _alone(source) as alone:
    for place in places:
      if os.path.exists(place + name):
        return place + name
    for place in places:
      with contextlib.suppress(_CannotWrite):
        _write(place, name, kind, make, alone=alone)
        return place + name
  raise UserError(
    f'{source}: what is made of this file, its .{kind}, can be written neither '
    f'beside it nor in {cache}. Make room, or set XDG_CACHE_HOME to a folder with room.'
  )


class _CannotWrite(Exception):
  """The place has no room, or is not ours."""


def _write(place: str, name: str, kind: str, make: Callable[[str], None], *, alone: bool) -> None:
  host = os.uname().nodename
  temporary = f'{place}{name}.{host}.{os.getpid()}.tmp'
  old = lambda suffix: glob.glob(f'{glob.escape(place)}*.{suffix}')
  try:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    pathlib.Path(temporary).touch()
  except OSError as error:
    raise _CannotWrite from error
  try:
    make(temporary)
    os.replace(temporary, place + name)
    # Of contents that are no more; if we are alone, of a process of this machine that was killed.
    killed = old(f'{kind}.{glob.escape(host)}.*.tmp') if alone else []
    for path in [*old(kind), *killed]:
      if path != place + name:
        pathlib.Path(path).unlink(missing_ok=True)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    raise _CannotWrite from error
  finally:
    pathlib.Path(temporary).unlink(missing_ok=True)


def fingerprint(source: str) -> str:
  """Hex digits that change with the file's size, time of change, and samples of its contents."""
  state = os.stat(source)
  digest = hashlib.sha256(f'{state.st_size} {state.st_mtime_ns}'.encode())
  with open(source, 'rb') as stream:
    for number in range(SAMPLES):
      stream.seek(max(state.st_size - BLOCK, 0) * number // (SAMPLES - 1))
      digest.update(stream.read(BLOCK))
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(source: str) -> Iterator[bool]:
  """Locks the file among processes; False where the file system cannot: each makes what it needs."""
  with open(source, 'rb') as stream:
    alone = False
    with contextlib.suppress(OSError):
      fcntl.flock(stream, fcntl.LOCK_EX)
      alone = True
    yield alone
