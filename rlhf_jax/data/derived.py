"""Files derived from a data file, such as an index of its lines, and kept for later runs.

They are hidden files beside the data, or in the user's cache if that folder cannot be written.
Their names contain a fingerprint of the data, so a file derived from other contents is never read.
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

SAMPLES = 32  # blocks of the data in the fingerprint
BLOCK = 4096  # bytes of a block


def file(source: str, kind: str, make: Callable[[str], None]) -> str:
  """Returns the path of a derived file, and writes it first if it does not exist.

  If several processes of one machine need it, one writes it and the others wait.

  Args:
    source: Path of the data.
    kind: Suffix of the derived file; include a version if its contents may change.
    make: Writes the derived file to a path.

  Raises:
    UserError: The file can be written neither beside the data nor in the cache.
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
    f'{source}: the .{kind} file derived from this file can be written neither beside it nor '
    f'in {cache}. Free some space, or set XDG_CACHE_HOME to a folder with space.'
  )


class _CannotWrite(Exception):
  """Raised if a folder is full or not writable."""


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
    # Remove files of earlier contents and, under the lock, of killed processes of this machine.
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
  """Returns a hash of the file's size, modification time and samples of its contents."""
  state = os.stat(source)
  digest = hashlib.sha256(f'{state.st_size} {state.st_mtime_ns}'.encode())
  with open(source, 'rb') as stream:
    for number in range(SAMPLES):
      stream.seek(max(state.st_size - BLOCK, 0) * number // (SAMPLES - 1))
      digest.update(stream.read(BLOCK))
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(source: str) -> Iterator[bool]:
  """Locks the file while the body runs, and yields whether the file system supports locks.

  If it does not, each process writes its own derived file.
  """
  with open(source, 'rb') as stream:
    alone = False
    with contextlib.suppress(OSError):
      fcntl.flock(stream, fcntl.LOCK_EX)
      alone = True
    yield alone
