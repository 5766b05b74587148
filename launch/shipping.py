"""What launch/tpu_vm.sh sends to the workers: this checkout as it is now.

Tracked files with their uncommitted changes, and untracked files that git does not ignore.
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

MAX_UNTRACKED_BYTES = 50 * 10**6  # data and models belong on SHARED, not in every worker's home
LIST = '.shipped'  # in the archive: its files, so that the next one can remove them first


class Error(Exception):
  """What the user must do; one line."""


@dataclasses.dataclass
class Shipment:
  """Files to send.

  Attributes:
    archive: .tar.gz of them.
    files: paths relative to the checkout, sorted.
    left_out: untracked paths that are too large, with their bytes.
    digest: changes with any path, mode or content.
    summary: one line: commit, numbers of files, bytes.
  """

  archive: pathlib.Path
  files: list[str]
  left_out: dict[str, int]
  digest: str
  summary: str


def git(root, *arguments):
  """The NUL-separated answer of git, as a list.

  Raises:
    Error: where git fails.
  """
  done = subprocess.run(['git', '-C', str(root), *arguments], text=True, capture_output=True)
  if done.returncode:
    raise Error(
      f'git {arguments[0]} failed in {root}, which must be a git checkout: {done.stderr.strip()}'
    )
  return [part for part in done.stdout.strip('\n').split('\0') if part]


def pack(root, archive):
  """Packs what is to be sent into a .tar.gz, with a list of its files.

  Args:
    root: folder of the checkout.
    archive: path to write.

  Returns:
    A Shipment.

  Raises:
    Error: where the folder is not a git checkout.
  """
  root = pathlib.Path(root)
  commit = git(root, 'rev-parse', '--short', 'HEAD')[0]
  tracked = {path for path in git(root, 'ls-files', '-z') if is_file(root / path)}
  changed = git(root, 'diff', '--name-only', '-z', '--relative', 'HEAD')
  others = git(root, 'ls-files', '-z', '--others', '--exclude-standard')
  sizes = {path: (root / path).lstat().st_size for path in others if is_file(root / path)}
  untracked, total = set(), 0
  for path in sorted(
    sizes, key=lambda path: (sizes[path], path)
  ):  # the smallest first: code before data
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
  """Whether it is a file or link, not a folder (submodule) or missing (deleted, not committed)."""
  try:
    mode = path.lstat().st_mode
  except OSError:
    return False
  return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def write(root, files, archive):
  """Writes the archive.

  Returns:
    A hash of paths, kinds and contents.
  """
  found = hashlib.sha256()
  with tarfile.open(archive, 'w:gz') as tar:
    for path in files:
      entry = tar.gettarinfo(root / path, arcname=path)
      entry.type, entry.linkname = (
        (entry.type, entry.linkname) if entry.issym() else (tarfile.REGTYPE, '')
      )
      content = b'' if entry.issym() else (root / path).read_bytes()
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
      found.update(
        f'{path}\0{entry.linkname}\0{entry.mode & 0o100}\0{len(content)}\0'.encode() + content
      )
    names = '\0'.join(files).encode()
    entry = tarfile.TarInfo(LIST)
    entry.size = len(names)
    tar.addfile(entry, io.BytesIO(names))
  return found.hexdigest()


def check_arguments(root, shipment, arguments):
  """Raises Error for an argument that names a file of this checkout that is not sent."""
  for argument in arguments:
    value = argument.partition('=')[2] if argument.startswith('-') else argument
    path = value.partition(':')[0]  # of --config=PATH:ARGUMENTS
    if not path or os.path.isabs(path) or not (pathlib.Path(root) / path).is_file():
      continue
    name = os.path.normpath(path)
    if name not in shipment.files and not name.startswith('..'):
      why = 'it is too large' if name in shipment.left_out else 'git ignores it'
      raise Error(
        f'{argument}: {path} is not shipped to the TPU, as {why}: '
        f'`git add -f {path}`, or put it on SHARED'
      )
