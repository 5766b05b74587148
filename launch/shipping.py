"""Packs the files that launch/tpu_vm.sh sends to the workers: the current state of this checkout.

These are tracked files with uncommitted changes, and untracked files that git does not ignore.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import stat
import subprocess
import tarfile

MAX_UNTRACKED_BYTES = 50 * 10**6  # data and models should be on SHARED, not on every worker
# File in the archive that lists its files, so that the next setup can remove them.
LIST = '.shipped'


class Error(Exception):
  """An error with a message of one line for the user."""


@dataclasses.dataclass
class Shipment:
  """Files to send.

  Attributes:
    archive: Path of the .tar.gz.
    files: Sorted paths relative to the checkout.
    left_out: {untracked path that is too large: bytes}.
    digest: Hash of paths, modes and contents.
    summary: One line with the commit, numbers of files, and size.
  """

  archive: pathlib.Path
  files: list[str]
  left_out: dict[str, int]
  digest: str
  summary: str


def git(root, *arguments):
  """Runs git and returns its NUL-separated output as a list.

  Raises:
    Error: If git fails.
  """
  done = subprocess.run(['git', '-C', str(root), *arguments], text=True, capture_output=True)
  if done.returncode:
    raise Error(
      f'git {arguments[0]} failed in {root}, which must be a git checkout: {done.stderr.strip()}'
    )
  return [part for part in done.stdout.strip('\n').split('\0') if part]


def pack(root, archive):
  """Packs the files to send and their list into a .tar.gz.

  Args:
    root: Folder of the checkout.
    archive: Path of the .tar.gz to write.

  Returns:
    Shipment.

  Raises:
    Error: If the folder is not a git checkout.
  """
  root = pathlib.Path(root)
  commit = git(root, 'rev-parse', '--short', 'HEAD')[0]
  tracked = {path for path in git(root, 'ls-files', '-z') if is_file(root / path)}
  changed = git(root, 'diff', '--name-only', '-z', '--relative', 'HEAD')
  others = git(root, 'ls-files', '-z', '--others', '--exclude-standard')
  sizes = {path: (root / path).lstat().st_size for path in others if is_file(root / path)}
  untracked, total = set(), 0
  for path in sorted(sizes, key=lambda path: (sizes[path], path)):  # code is smaller than data
    total += sizes[path]
    if total > MAX_UNTRACKED_BYTES:
      break
    untracked.add(path)
  files = sorted(tracked | untracked)
  digest = write(root, files, archive)
  megabytes = os.path.getsize(archive) / 1e6
  summary = (
    f'commit {commit} with {len(changed)} changed and {len(untracked)} untracked files, '
    f'{megabytes:.1f} MB'
  )
  left_out = {path: size for path, size in sizes.items() if path not in untracked}
  return Shipment(pathlib.Path(archive), files, left_out, digest, summary)


def is_file(path):
  """Returns whether the path is a file or link. It may be a submodule or a deleted file."""
  try:
    mode = path.lstat().st_mode
  except OSError:
    return False
  return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def write(root, files, archive):
  """Writes the archive, and returns a hash of paths, modes and contents."""
  digest = hashlib.sha256()
  with tarfile.open(archive, 'w:gz') as tar:
    for path in files:
      entry = tar.gettarinfo(root / path, arcname=path)
      entry.type, entry.linkname = (
        (entry.type, entry.linkname) if entry.issym() else (tarfile.REGTYPE, '')
      )
      content = b'' if entry.issym() else (root / path).read_bytes()
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
      digest.update(
        f'{path}\0{entry.linkname}\0{entry.mode & 0o100}\0{len(content)}\0'.encode() + content
      )
    names = '\0'.join(files).encode()
    entry = tarfile.TarInfo(LIST)
    entry.size = len(names)
    tar.addfile(entry, io.BytesIO(names))
  return digest.hexdigest()


def check_arguments(root, shipment, arguments):
  """Raises Error if an argument names a file of this checkout that is not sent."""
  for argument in arguments:
    value = argument.partition('=')[2] if argument.startswith('-') else argument
    path = value.partition(':')[0]  # of --config=PATH:ARGUMENTS
    if not path or os.path.isabs(path) or not (pathlib.Path(root) / path).is_file():
      continue
    name = os.path.normpath(path)
    if name not in shipment.files and not name.startswith('..'):
      why = 'it is too large' if name in shipment.left_out else 'git ignores it'
      raise Error(
        f'{argument}: {path} is not sent to the TPU, because {why}: '
        f'run `git add -f {path}`, or put it on SHARED'
      )
