"""Judgements of a store as a data set: 'feedback:URL#PROJECT', with options after a '?'.

  feedback:feedback.db#helpful
  feedback:postgresql://HOST/NAME#helpful?round=2&form=rankings&simulated=false

  | option    | default | the data set has                                              |
  |-----------|---------|---------------------------------------------------------------|
  | form      | pairs   | 'pairs', 'rankings' or 'ratings'; see reading.records         |
  | round     | all     | only judgements of this round                                 |
  | simulated | both    | true: only those of simulated annotators; false: of people    |
  | until     | all     | only judgements up to this id                                 |

A run that resumes reads the same judgements as before, even if there are new ones: `pins` fixes
`until` when the run starts, and `write` records it in the folder of the run, with a fingerprint of
the records.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any
import urllib.parse

import ml_collections

from rlhf_jax import identity
from rlhf_jax import processes
from rlhf_jax.data import stored
from rlhf_jax.errors import UserError

SCHEME = 'feedback:'
FILE = 'feedback.json'  # in the folder of a run
OPTIONS = ('form', 'round', 'simulated', 'until')


@dataclasses.dataclass(frozen=True)
class Source:
  """A parsed path; `options` are keyword arguments of `Store.records`."""

  url: str
  project: str
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pin:
  """What a run reads from a store: its judgements up to `until`, whose hash is `fingerprint`."""

  until: int
  fingerprint: str


def parse(path: str) -> Source:
  """Returns the parts of a path.

  Raises:
    UserError: It has no project, or an option is unknown or has a bad value.
  """
  url, _, rest = path.removeprefix(SCHEME).rpartition('#')
  project, _, query = rest.partition('?')
  if not url or not project:
    raise UserError(f'{path}: name a store and a project of it, as in {SCHEME}feedback.db#PROJECT')
  options = {}
  for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if name not in OPTIONS:
      raise UserError(f'{path}: there is no option {name!r}: use {", ".join(OPTIONS)}')
    if name == 'simulated' and value not in ('true', 'false'):
      raise UserError(f'{path}: simulated={value} must be true or false')
    if name in ('round', 'until') and not re.fullmatch('[0-9]{1,18}', value):
      raise UserError(f'{path}: {name}={value} must be a whole number')
    if name == 'form':
      options[name] = value
    else:
      options[name] = value == 'true' if name == 'simulated' else int(value)
  return Source(url, project, options)


def read(path: str) -> stored.Records:
  """Returns the records of a path; messages name the id of a record's judgement.

  Raises:
    UserError: There is no such store or project.
  """
  from rlhf_jax.feedback import reading  # needs the extra 'feedback'

  source = parse(path)
  with _open(source) as store:
    project, where = store.project(source.project), store.database.url
    options = dict(source.options)
    selected = {name: options.pop(name) for name in ('round', 'until') if name in options}
    found = reading.records(store.judgements(project, **selected), **options)
  return stored.Listed(
    [
      stored.Record(fields, f'{SCHEME}{where}#{source.project}:judgement {number}')
      for fields, number in found
    ]
  )


def _open(source):
  from rlhf_jax.feedback import store  # needs the extra 'feedback'

  return store.Store.open(source.url, create=False)


def pins(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, forked_from: str | None = None
) -> dict[str, Pin]:
  """Returns {path: what the run reads from it} for every path of a store in a config.

  All processes of a run call this together.

  Args:
    config: Config of the run.
    workdir: Folder of the run, in which an earlier start may have fixed what to read.
    forked_from: Folder of the run that this one is a fork of, or None.

  Raises:
    UserError: A store cannot be read, or no longer has the judgements that the run started with.
  """
  paths = _paths(config.to_dict())
  if not paths:
    return {}
  folders = [workdir, *([forked_from] if forked_from else [])]
  found = processes.run_on_main_process(lambda: {path: _pin(path, folders) for path in paths})
  # Only the main process has looked; the others need no fingerprint.
  untils = [processes.broadcast_scalar(found[path].until if found else 0) for path in paths]
  return found or {path: Pin(until, '') for path, until in zip(paths, untils)}


def _pin(path, folders):
  source = parse(path)
  with _open(source) as store:
    project = store.project(source.project)
    last = store.last(project)
    read_to = lambda until: store.fingerprint(project, **(source.options | {'until': until}))
    for folder in folders:
      file = pathlib.Path(folder) / FILE
      recorded = json.loads(file.read_text()) if file.exists() else {}
      if path in recorded:
        pin = Pin(**recorded[path])
        if read_to(pin.until) != pin.fingerprint:
          raise UserError(
            f'{path}: the judgements up to {pin.until} are not those with which the run in '
            f'{folder} started. Restore the store, or name another --workdir.'
          )
        newer = f'; the newer ones, up to {last}, are left out' if last > pin.until else ''
        print(f'{path}: judgements up to {pin.until}, as before{newer}', flush=True)
        return pin
    until = min(last, source.options.get('until', last))
    return Pin(until, read_to(until))


def pinned(
  config: ml_collections.ConfigDict, found: Mapping[str, Pin]
) -> ml_collections.ConfigDict:
  """Returns a config in which every path of a store says up to which judgement it is read."""
  if not found:
    return config
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.update(_replaced(config.to_dict(), found))
  return config.lock()


def write(workdir: pathlib.Path, found: Mapping[str, Pin]) -> None:
  """Writes feedback.json into the folder of a run, if it reads a store."""
  if found:
    content = {path: dataclasses.asdict(pin) for path, pin in found.items()}
    identity.write_json(workdir / FILE, content)


def _paths(value):
  """Returns the paths of stores in a nested config, sorted."""
  if isinstance(value, str):
    return [value] if value.startswith(SCHEME) else []
  if isinstance(value, dict):
    return _paths(list(value.values()))
  if isinstance(value, (list, tuple)):
    return sorted({path for item in value for path in _paths(item)})
  return []


def _replaced(value, found):
  if isinstance(value, str) and value in found:
    url, _, rest = value.rpartition('#')
    project, _, query = rest.partition('?')
    kept = [item for item in query.split('&') if item and not item.startswith('until=')]
    return f'{url}#{project}?{"&".join([*kept, f"until={found[value].until}"])}'
  if isinstance(value, dict):
    return {key: _replaced(item, found) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_replaced(item, found) for item in value)
  return value
