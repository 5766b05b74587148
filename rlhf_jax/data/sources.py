"""Records from files, directories and public data sets.

`read` turns whatever holds the data into a sequence of records: the fields as they are, and where
each one came from, so that a complaint about a record can name its line. What the fields mean is
the business of `formats`.

    | source                       | one record per                           | place in messages    |
    |------------------------------|------------------------------------------|----------------------|
    | x.jsonl, x.jsonl.gz          | non-blank line, an object                | x.jsonl:17           |
    | x.json, x.json.gz            | element of the list (or of the object's) | x.json:item 16       |
    | x.csv, x.tsv, also .gz       | row, by the column names of the first    | x.csv:17             |
    | x.parquet                    | row                                      | x.parquet:row 16     |
    | x.arrayrecord                | record, a JSON object                    | x.arrayrecord:row 16 |
    | x.txt, x.txt.gz              | non-blank piece between `separator`s     | x.txt:17             |
    | directory                    | all of the above in its files, sorted    | that of the file     |
    | tfds:NAME                    | example of the TFDS data set             | tfds:NAME:row 16     |
    | any other name               | row of the Hugging Face data set         | NAME:row 16          |

Lines are counted from 1, as editors do; items and rows from 0, as Python does. Values of CSV and
TSV are strings (`Record.untyped`).
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

HUB_SECONDS = 10  # for the hub's first answer
NAMED = 5  # files, in a message
LOOKED_AT = 100_000  # records, for a warning


def read(
  path: str,
  *,
  split: str = '',
  columns: Mapping[str, str] | None = None,
  separator: str = '\n',
  format: str | None = None,
) -> stored.Records:
  """The records of a source, in order.

  Args:
    path: a file, a directory, `tfds:NAME`, or the name of a Hugging Face data set, which may
      carry its configuration as in `openai/gsm8k:main`.
    split: of a public data set, the split's name ('' is 'train'). Of a directory, only files
      named after it are read: `test` takes test.jsonl and test-00000-of-00002.parquet. Of a JSON
      file that is one object, the key whose list is wanted.
    columns: new name to stored name, for data that call their columns otherwise:
      {'prompt': 'question', 'completion': 'answer'}.
    separator: what stands between two texts of a plain text file: a line break, '\\n\\n' for
      paragraphs, '<|endoftext|>'; '' makes the whole file one text.
    format: of a file whatever its suffix, and of all files of a directory: 'text' or another value
      of `files.FORMATS`. None goes by the suffix.

  Returns:
    A sequence of at least one record, which is read from the disk when it is asked for. One that
    cannot be read, or lacks a column, raises DataError, which names file and line.

  Raises:
    UserError: the source is missing, unknown, empty or lacks the split.
    DataError: a whole file is damaged; names it.
  """
  path = os.fspath(path)
  if path.startswith('tfds:'):
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
  """Writes records as JSONL, whole or not at all."""
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
  """Says which filled fields the new names replace, of the first records."""
  first = range(min(len(records), LOOKED_AT))
  for new, old in columns.items():
    if new in columns.values():  # renamed itself
      continue
    count = 0
    for index in first:
      with contextlib.suppress(DataError):  # whoever reads them all says so
        count += records[index].fields.get(new) not in (None, '')
    if count:
      logging.warning(
        '%s: %s=%s of config.data.columns replaces a filled field %r in %d of %s%d records. Name '
        'another column if you meant to keep it.',
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
        f'names; the fields are {sorted(record.fields)}.'
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
      f'{", ".join(files.FORMATS)} (or these and .gz). Rename yours, or say how to '
      'read them with config.data.format.'
    )
  relative = lambda names: [os.path.relpath(name, path) for name in names]
  chosen = [file for file in known if _in_split(file, split)] if split else known
  if not chosen:
    raise UserError(
      f'{path}: no file of split {split!r} among {", ".join(relative(known))}. '
      'Name one of these, or no split at all.'
    )
  passed_over = relative(file for file in paths if not (format or files.format_of(file)))
  if passed_over:
    logging.warning(
      '%s: %d of %d files passed over, whose suffixes are not known: %s%s.',
      path,
      len(passed_over),
      len(paths),
      ', '.join(passed_over[:NAMED]),
      ', ...' if passed_over[NAMED:] else '',
    )
  return stored.Joined([files.read(file, '', separator, format) for file in chosen])


def _in_split(file: str, split: str) -> bool:
  stem = os.path.basename(file).split('.')[0]
  return stem == split or stem.startswith((split + '-', split + '_'))


# Public data sets.


def _tfds(path: str, split: str) -> stored.Records:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f'{path}: reading TFDS data sets needs further packages: pip install tensorflow-datasets '
      'importlib_resources'
    ) from error
  try:
    source = tfds.data_source(path.removeprefix('tfds:'), split=split)
  except Exception as error:  # TFDS raises many kinds, some of its own, some of the network's.
    raise UserError(
      f'{path}, split {split!r}: TFDS cannot give this data set ({error}).'
    ) from error
  return stored.Mapped(source, _plain, path)


def _plain(value: Any) -> Any:
  """NumPy scalars, arrays and bytes, as TFDS gives them, to Python's own types."""
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
  import datasets  # takes a second, and few runs need it

  name, _, config = path.partition(':')
  silent = _hub_silence(name)
  if silent:
    # With this it reads its cache or fails, and does not try again for half a minute.
    datasets.config.HF_HUB_OFFLINE = True
  try:
    rows = datasets.load_dataset(name, config or None, split=split)
  except Exception as error:  # Many kinds, some of the network's.
    reason = (
      f'the hub gives no answer ({silent})'
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
  """Why the hub gives no answer about a data set; '' where it gives one, be it a refusal."""
  import huggingface_hub

  try:
    huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
  except huggingface_hub.errors.HFValidationError:
    return ''
  except huggingface_hub.errors.HfHubHTTPError as error:
    return _one_line(error) if error.response.status_code >= 500 else ''
  except Exception as error:  # of the library that it uses for HTTP
    return _one_line(error)
  return ''


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')
