"""Records from files, directories and public data sets.

`read` returns the records of any supported source: their fields, unchanged, and the place each one
came from, so that an error message can name the line. `formats` interprets the fields.

  | source                       | one record per                           | place in messages    |
  |------------------------------|------------------------------------------|----------------------|
  | x.jsonl, x.jsonl.gz          | non-blank line, an object                | x.jsonl:17           |
  | x.json, x.json.gz            | element of the list (or of the object's) | x.json:item 16       |
  | x.csv, x.tsv, also .gz       | row, by the column names of the first    | x.csv:17             |
  | x.parquet                    | row                                      | x.parquet:row 16     |
  | x.arrayrecord                | record, a JSON object                    | x.arrayrecord:row 16 |
  | x.txt, x.txt.gz              | non-blank text between `separator`s      | x.txt:17             |
  | directory                    | all of the above in its files, sorted    | that of the file     |
  | tfds:NAME                    | example of the TFDS data set             | tfds:NAME:row 16     |
  | feedback:URL#PROJECT         | judgement in a store of human feedback   | ...:judgement 16     |
  | any other name               | row of the Hugging Face data set         | NAME:row 16          |

Lines are numbered from 1, as in editors; items and rows from 0, as in Python. All values of CSV and
TSV files are strings (`Record.untyped`).
"""

from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from absl import logging

from rlhf_jax.data import files
from rlhf_jax.data import stored
from rlhf_jax.data.stored import Record
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

HUB_SECONDS = 10  # timeout of the first request to the hub
MAX_NAMED = 5  # files listed in a message
MAX_CHECKED = 100_000  # records checked for replaced fields


def read(
  path: str,
  *,
  split: str = '',
  columns: Mapping[str, str] | None = None,
  separator: str = '\n',
  format: str | None = None,
) -> stored.Records:
  """Returns the records of a source, in order.

  Args:
    path: a file, a directory, `tfds:NAME`, `feedback:URL#PROJECT` (see feedback/source.py), or the
      name of a Hugging Face data set, which may include a configuration, as in
      `openai/gsm8k:main`.
    split: The split of a public data set ('' means 'train'). In a directory, only files named
      after the split are read: `test` selects test.jsonl and test-00000-of-00002.parquet. In a JSON
      file that holds one object, the key of the list to read.
    columns: {new name: stored name}, to rename columns:
      {'prompt': 'question', 'completion': 'answer'}.
    separator: The text between two records of a plain text file: a line break, '\\n\\n' for
      paragraphs, '<|endoftext|>'. '' makes the whole file one record.
    format: The format of the file, or of all files in the directory, whatever their suffixes: a
      value of `files.FORMATS`. None selects the format by suffix.

  Returns:
    A sequence of at least one record. Records are read from disk when they are accessed; one that
    cannot be read, or lacks a column, raises a DataError that names file and line.

  Raises:
    UserError: The source is missing, unknown or empty, or has no such split.
    DataError: A whole file is damaged; the message names it.
  """
  path = os.fspath(path)
  if path.startswith('feedback:'):
    records = _feedback(path, split)
  elif path.startswith('tfds:'):
    records = _tfds(path, split or 'train')
  elif os.path.isdir(path):
    records = _directory(path, split, separator, format)
  elif os.path.isfile(path):
    records = files.read(path, split, separator, format)
  elif _looks_local(path):
    raise UserError(
      f'{path}: no such file or directory (current directory: {os.getcwd()}). '
      'Set the path of the data to a file that exists.'
    )
  else:
    records = _hub(path, split or 'train')
  if not len(records):
    raise UserError(f'{path}: the data set is empty. Give a source with at least one record.')
  if columns:
    _warn_replaced(path, records, columns)
    records = stored.Changed(records, functools.partial(_rename, columns=columns))
  return records


def write(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
  """Writes records as JSONL, atomically."""
  temporary = f'{os.fspath(path)}.tmp'
  with open(temporary, 'w', encoding='utf-8') as stream:
    stream.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  os.replace(temporary, path)


def _looks_local(path: str) -> bool:
  first = path.split('/')[0]
  return (
    path.startswith(('/', '.', '~'))
    or path.endswith(os.sep)
    or path.count('/') > 1
    or '\\' in path
    or files.format_of(path) is not None
    or (first != path and os.path.isdir(first))
  )


def _warn_replaced(path: str, records: stored.Records, columns: Mapping[str, str]) -> None:
  """Warns if renamed columns replace fields that have values in the first records."""
  first = range(min(len(records), MAX_CHECKED))
  for new, old in columns.items():
    if new in columns.values():  # is renamed too
      continue
    count = 0
    for index in first:
      with contextlib.suppress(DataError):  # reported when the records are converted
        count += records[index].fields.get(new) not in (None, '')
    if count:
      logging.warning(
        '%s: %s=%s in config.data.columns replaces field %r, which has a value in %d of %s%d '
        'records. Use another column to keep that field.',
        path,
        new,
        old,
        new,
        count,
        'the first ' if len(first) < len(records) else '',
        len(first),
      )


def _rename(record: Record, *, columns: Mapping[str, str]) -> Record:
  fields = dict(record.fields)
  for name in columns.values():
    if name not in record.fields:
      raise DataError(
        f'{record.where}: there is no field {name!r}, which config.data.columns '
        f'refers to; the fields are {sorted(record.fields)}.'
        + (' The first row of the file must name the columns.' if record.untyped else '')
      )
    fields.pop(name, None)
  fields.update({new: record.fields[name] for new, name in columns.items()})
  return dataclasses.replace(record, fields=fields)


def _directory(path: str, split: str, separator: str, format: str | None) -> stored.Records:
  paths = sorted(
    str(p)
    for p in pathlib.Path(path).rglob('*')
    if p.is_file() and not any(part.startswith('.') for part in p.relative_to(path).parts)
  )
  known = [file for file in paths if format or files.format_of(file)]
  if not known:
    raise UserError(
      f'{path}: no data file in this directory; files must end in '
      f'{", ".join(files.FORMATS)}, or one of these with .gz. Rename the files, or set '
      'config.data.format.'
    )
  relative = lambda names: [os.path.relpath(name, path) for name in names]
  chosen = [file for file in known if _in_split(file, split)] if split else known
  if not chosen:
    raise UserError(
      f'{path}: no file belongs to split {split!r}; the files are {", ".join(relative(known))}. '
      'Use the split of one of them, or no split.'
    )
  skipped = relative(file for file in paths if not (format or files.format_of(file)))
  if skipped:
    logging.warning(
      '%s: skipped %d of %d files with unknown suffixes: %s%s.',
      path,
      len(skipped),
      len(paths),
      ', '.join(skipped[:MAX_NAMED]),
      ', ...' if skipped[MAX_NAMED:] else '',
    )
  return stored.Joined([files.read(file, '', separator, format) for file in chosen])


def _in_split(file: str, split: str) -> bool:
  stem = os.path.basename(file).split('.')[0]
  return stem == split or stem.startswith((split + '-', split + '_'))


def _feedback(path: str, split: str) -> stored.Records:
  from rlhf_jax.feedback import source  # a layer above: see .importlinter

  if split:
    raise UserError(f'{path}: a store has no split {split!r}. Use ?round=N, or no split.')
  return source.read(path)


# Public data sets.


def _tfds(path: str, split: str) -> stored.Records:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f"{path}: TFDS data sets need two more packages: pip install 'rlhf_jax[tfds]'"
    ) from error
  try:
    source = tfds.data_source(path.removeprefix('tfds:'), split=split)
  except Exception as error:  # TFDS raises its own errors and those of the network
    raise UserError(
      f'{path}, split {split!r}: TFDS cannot load this data set ({error}).'
    ) from error
  return stored.Mapped(source, _plain, path)


def _plain(value: Any) -> Any:
  """Converts the NumPy scalars, arrays and bytes of TFDS to built-in types."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value


def _hub(path: str, split: str) -> stored.Records:
  import datasets  # slow to import, and few runs need it

  name, _, config = path.partition(':')
  silent = _hub_silence(name)
  if silent:
    # Offline, `datasets` reads its cache or fails at once, instead of retrying for half a minute.
    datasets.config.HF_HUB_OFFLINE = True
  try:
    rows = datasets.load_dataset(name, config or None, split=split)
  except Exception as error:  # errors of many types, some from the network
    reason = (
      f'the hub does not respond ({silent})'
      if silent and isinstance(error, ConnectionError)
      else _one_line(error)
    )
    raise UserError(
      f'{path}: no such file or directory (current directory: {os.getcwd()}), and it cannot be '
      f'loaded as a Hugging Face data set, split {split!r}: {reason}. Check the name and the '
      'network.'
    ) from error
  return stored.Mapped(rows, dict, path)


def _hub_silence(name: str) -> str:
  """Returns why the hub does not respond to a request; '' if it responds, even with an error."""
  import huggingface_hub

  try:
    huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
  except huggingface_hub.errors.HFValidationError:
    return ''
  except huggingface_hub.errors.HfHubHTTPError as error:
    return _one_line(error) if error.response.status_code >= 500 else ''
  except Exception as error:  # errors from the HTTP library that it uses
    return _one_line(error)
  return ''


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')
