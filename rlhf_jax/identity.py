"""Records and checks the identity of a run: its config, its input files, and all its starts.

A workdir belongs to one config, which `config.json` holds; `runs.jsonl` has a line for each start.
A start with another config is refused with a list of the keys that differ, unless all of them are
in MAY_CHANGE. A start is also refused if the contents of an input file have changed.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any, NamedTuple

from rlhf_jax import errors
from rlhf_jax import folders

CONFIG = 'config.json'
RUNS = 'runs.jsonl'
BASE = 'base_config.json'
ABSENT = '(absent)'
# Keys whose value may change when a run resumes, and what they affect; also all keys below them.
MAY_CHANGE = {
  'steps': 'how long it trains',
  'data.epochs': 'how long it trains',
  'log_every': 'what is logged, not what is trained',
  'samples_every': 'what is logged, not what is trained',
  'evals': 'what is measured, not what is trained',
  'warn': 'what is reported, not what is trained',
  'wandb_project': 'where metrics are shown',
  'checkpoint_every': 'when checkpoints are saved',
  'checkpoint_minutes': 'when checkpoints are saved',
  'keep_checkpoints': 'how many checkpoints are kept',
  'mesh': 'on which devices it is computed; sums agree up to rounding',
  'microbatch_size': 'how a batch is split; sums agree up to rounding',
  'model.remat': 'how it is computed',
  'model.unroll': 'how it is compiled',
  'rl.length_buckets': 'how a batch is split; sums agree up to rounding',
  'sampling.gather_weights': 'how it is computed',
  'sampling.max_concurrent': 'how it is computed; the responses are the same',
  'dpo.reference_logprobs': 'where log-probabilities are kept',
  'reward.timeout': 'how long it waits',
  'reward.example_timeout': 'how long it waits',
  'reward.request_timeout': 'how long it waits',
  'reward.attempts': 'how long it waits',
  'reward.workers': 'how it is computed',
  'reward.request_size': 'how it is computed',
  'reward.url': 'where rewards are computed; they must be the same',
}
LENGTH_KEYS = ('steps', 'data.epochs')
# Keys that determine the optimizer state; if one of them differs, a fork starts with a new state.
OPTIMIZERS = ('optim.name', 'optim.ema', 'optim.master_dtype', 'optim.moment_dtype')
# Keys that name files, besides those that end in 'path'. The files may move but not change.
INPUTS = ('tokenizer', 'reference', 'model', 'models', 'teacher')
# Keys that hold a text or name the file of one, which may move but not change either.
TEXTS = ('context',)
MAX_HASHED = 2**26  # bytes; a file up to this size is hashed completely
HASHED_AT_ENDS = 2**20  # bytes that are hashed at each end of a larger file


class Change(NamedTuple):
  """A config key with two values.

  Attributes:
    key: Dotted key without 'config.'.
    before: JSON value in the earlier config, or ABSENT.
    after: JSON value in the new config, or ABSENT.
  """

  key: str
  before: Any
  after: Any

  def __str__(self):
    return f'config.{self.key}: {_short(self.before)} -> {_short(self.after)}'


def _short(value):
  text = value if value == ABSENT else repr(value)
  return text if len(text) <= 120 else text[:117] + '...'


def to_plain_dict(config):
  """Returns a config as it is read back from JSON: a nested dict, with lists for tuples."""
  return json.loads(json.dumps(config.to_dict()))


def read(workdir):
  """Returns config.json of a workdir as a dict, or None if there is none.

  Raises:
    UserError: The file is not JSON.
  """
  path = pathlib.Path(workdir) / CONFIG
  try:
    config = json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise errors.UserError(f'{path} is not JSON ({error}): name another --workdir') from None
  return config if isinstance(config, dict) else None


def completed(before, defaults):
  """Adds the defaults of keys that the version which wrote a config did not have.

  Args:
    before: Content of a run's config.json, or None.
    defaults: Default config of the run's algorithm, a dict.

  Returns:
    A dict with the keys of both; `before` itself if it is None or of another algorithm.
  """
  if before is None or before.get('algorithm') != defaults.get('algorithm'):
    return before
  return _completed(before, defaults)


def _completed(before, defaults):
  found = defaults | before
  for key, default in defaults.items():
    # The names in 'evals' belong to the run: none of them is a default.
    if key != 'evals' and isinstance(default, dict) and isinstance(before.get(key), dict):
      found[key] = _completed(before[key], default)
  return found


def changes(before, after, prefix=''):
  """Returns the keys that differ between two configs; None counts as absent.

  Args:
    before: Nested dict of JSON values.
    after: Nested dict of JSON values.
    prefix: Text before each key.

  Returns:
    List of Change, in the order of `after`.
  """
  differences = []
  for key in [*after, *(key for key in before if key not in after)]:
    old, new = before.get(key, ABSENT), after.get(key, ABSENT)
    name = f'{prefix}{key}'
    if isinstance(old, dict) and isinstance(new, dict):
      differences += changes(old, new, f'{name}.')
    elif not _same(old, new):
      differences.append(Change(name, old, new))
  return differences


def _same(old, new):
  """Returns whether two values are the same; True is not 1, and None counts as absent."""
  old, new = (None if value is ABSENT else value for value in (old, new))
  return isinstance(old, bool) == isinstance(new, bool) and old == new


def write_base(config, workdir):
  """Writes the base config of the run's algorithm, for reports to show what the run changed.

  Args:
    config: ConfigDict of the algorithm's module, without the run's changes.
    workdir: Folder of the run.
  """
  write_json(pathlib.Path(workdir) / BASE, to_plain_dict(config))


def from_base(config, workdir):
  """Returns the keys of a run's config that differ from the base config of its algorithm.

  Args:
    config: The run's config, a dict.
    workdir: Folder of the run.

  Returns:
    List of Change; None if the base config is not known.
  """
  path = pathlib.Path(workdir) / BASE
  if not path.exists():
    return None
  found = changes(json.loads(path.read_text()), config)
  return [change for change in found if not change.key.startswith('forked_from')]


def may_change(key):
  """Returns whether a run may resume with another value of a dotted key.

  The keys of a part of the reward are those of `reward`.
  """
  key = re.sub(r'^reward\.parts\.[^.]+\.', 'reward.', key)
  return any(key == name or key.startswith(f'{name}.') for name in MAY_CHANGE)


def has_checkpoint(workdir):
  """Returns whether there is a checkpoint in a workdir."""
  saved = pathlib.Path(workdir) / 'checkpoints'
  return saved.is_dir() and any(entry.name.isdigit() for entry in saved.iterdir())


def check(config, workdir, defaults):
  """Compares a config with that of the run in `workdir` and returns the changes, all allowed.

  Args:
    config: ConfigDict of a single run.
    workdir: Folder of the run.
    defaults: See `completed`.

  Returns:
    List of Change; empty for a new run.

  Raises:
    UserError: Other keys, or the contents of input files, differ; the message lists all of them.
  """
  before = completed(read(workdir), defaults)
  finished = (pathlib.Path(workdir) / 'model').exists()
  if before is None and (finished or has_checkpoint(workdir)):
    raise errors.UserError(f'{workdir} holds a run without its {CONFIG}: name another --workdir')
  if not finished and not has_checkpoint(workdir):
    return []  # there is nothing to resume
  after, inputs = to_plain_dict(config), _recorded(workdir)
  allowed, refused = [], []
  for change in changes({k: v for k, v in before.items() if k != 'forked_from'}, after):
    moved = change.key in inputs and inputs[change.key] == fingerprint(change.after)
    length = finished and change.key in LENGTH_KEYS
    (allowed if (may_change(change.key) or moved) and not length else refused).append(change)
  if refused:
    raise errors.UserError(explain_refusal(refused, workdir, finished=finished))
  changed = [
    f'config.{key}={value}'
    for key, value in input_keys(after).items()
    if not may_change(key) and inputs.get(key) not in (None, fingerprint(value))
  ]
  if changed and not finished:
    raise errors.UserError(
      f'{", ".join(changed)}: the contents have changed since the run in {workdir} started. '
      'Restore them, or name another --workdir; the run was not changed.'
    )
  return allowed


def changed_code(config, workdir):
  """Returns the keys of user code, such as 'reward.function', that changed since the last start."""
  last = _recorded(workdir, last=True)
  return [
    key
    for key, name in code_keys(to_plain_dict(config)).items()
    if last.get(key) not in (None, fingerprint(code_file(name)))
  ]


def explain_refusal(refused, workdir, *, finished=False, pipeline=False):
  """Returns the error message for changes that are not allowed.

  Args:
    refused: List of Change.
    workdir: Folder of the run.
    finished: Whether the run is finished.
    pipeline: Whether it is the run of a pipeline.
  """
  listed = '; '.join(map(str, refused))
  if pipeline:
    remedy = (
      'to repeat a stage, delete its folder and those of the stages after it; or add '
      '--fork=NEWDIR to keep this run and copy the stages before it'
    )
  else:
    remedy = 'or add --fork=NEWDIR to start in NEWDIR from the last checkpoint of this run'
    remedy += ', with more steps' if finished else ''
  return (
    f'{workdir} {"is finished" if finished else "was started"} with another config: {listed}. '
    f'Name another --workdir; {remedy}. The run was not changed.'
  )


def input_keys(config, prefix=''):
  """Returns {dotted key: value} of the keys that name files or folders."""
  values = {}
  for key, value in config.items():
    if isinstance(value, dict):
      values |= input_keys(value, f'{prefix}{key}.')
    elif value and (key.endswith('path') or key in INPUTS) and isinstance(value, (str, list)):
      values[f'{prefix}{key}'] = value
    elif key in TEXTS and isinstance(value, str) and os.path.isfile(value):
      values[f'{prefix}{key}'] = value
  return values


def code_keys(config, prefix=''):
  """Returns {dotted key: 'module' or 'module:name'} of the keys that name a user's code."""
  names = {}
  for key, value in config.items():
    if isinstance(value, dict):
      names |= code_keys(value, f'{prefix}{key}.')
    elif isinstance(value, str) and (key == 'function' or key == 'algorithm' and '.' in value):
      names[f'{prefix}{key}'] = value
  return names


def code_file(name):
  """Returns the file of 'module' or 'module:name', or the name itself if there is no file."""
  try:
    return importlib.util.find_spec(name.partition(':')[0]).origin
  except (ImportError, AttributeError, ValueError):
    return name


def fingerprint(value):
  """Returns a hash of the contents of a path.

  If the path does not exist, its name is hashed. Of the folder of a run, only the model is hashed.
  Of a file above 64 MiB, the size and the first and last MiB are hashed.

  Args:
    value: A path, or a list of paths that are hashed together.
  """
  digest = hashlib.sha256()
  for name in value if isinstance(value, list) else [value]:
    root = _model(pathlib.Path(str(name)))
    if not root.exists():
      digest.update(f'name {name}'.encode())
      continue
    files = (
      [root]
      if root.is_file()
      else sorted(
        path
        for path in root.rglob('*')
        if path.is_file() and not any(part.startswith('.') for part in path.relative_to(root).parts)
      )
    )
    for file in files:
      size = file.stat().st_size
      digest.update(f'{file.relative_to(root)} {size}\n'.encode())
      with open(file, 'rb') as opened:
        digest.update(opened.read(MAX_HASHED if size <= MAX_HASHED else HASHED_AT_ENDS))
        if size > MAX_HASHED:
          opened.seek(-HASHED_AT_ENDS, os.SEEK_END)
          digest.update(opened.read())
  return digest.hexdigest()[:16]


def _model(path):
  try:
    return folders.find_model(path) if path.is_dir() else path
  except errors.UserError:
    return path


def check_steps(config, steps, step, workdir, *, forked):
  """Raises UserError if a run has already taken more steps than its config asks for.

  Args:
    config: ConfigDict of the run.
    steps: Number of steps that the config asks for.
    step: Number of finished steps.
    workdir: Folder of the run.
    forked: Whether this is the first start of a fork, which must take at least one step.
  """
  if step >= steps and forked:
    raise errors.UserError(
      f'the checkpoint that {workdir} starts from is after step {step}, and the config asks for '
      f'{steps} steps in total: set config.steps above {step}'
    )
  if step > steps:
    length = f'steps={config.steps}' if config.steps else f'data.epochs={config.data.epochs}'
    raise errors.UserError(
      f'config.{length}, which is {steps} steps, but the checkpoint in {workdir} is after step '
      f'{step}: set at least {step} steps, or name another --workdir'
    )


def record_start(config, workdir, *, changed, step=None, forked_from=None):
  """Writes config.json if it is new or has changed, and appends a line to runs.jsonl.

  Args:
    config: ConfigDict of the run.
    workdir: Folder of the run.
    changed: List of Change since the last start.
    step: Step that this start resumes from, 0 for a new run, None for a pipeline.
    forked_from: {'workdir', 'step'} of the run that this one starts from; None keeps the value in
      config.json.
  """
  recorded = read(workdir)
  if (
    recorded is None
    or step == 0
    or changed
    or forked_from
    or recorded.get('stages') != to_plain_dict(config).get('stages')
  ):
    forked_from = forked_from or (None if step == 0 else (recorded or {}).get('forked_from'))
    write_json(
      pathlib.Path(workdir) / CONFIG,
      to_plain_dict(config) | ({'forked_from': forked_from} if forked_from else {}),
    )
  _append_start(config, workdir, step=step, changed=changed, first=step == 0 or bool(forked_from))


def write_json(path, value):
  """Writes a JSON file atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2))
  os.replace(temporary, path)


def _append_start(config, workdir, *, step, changed, first):
  """Appends a line to runs.jsonl: the time, host, code version and overridden keys of a start.

  Args:
    config: ConfigDict of the run.
    workdir: Folder of the run.
    step: Step that this start resumes from, None for a pipeline.
    changed: List of Change since the last start.
    first: Whether the run begins with this start, at step 0 or from the checkpoint of a fork.
  """
  record = {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'step': step,
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'version': version(),
    'commit': commit(),
    'overridden': [arg for arg in sys.argv[1:] if arg.lstrip('-').startswith('config')],
    'changed': {key: [before, after] for key, before, after in changed},
  }
  if step is not None:
    inputs = input_keys(to_plain_dict(config)) | {
      key: code_file(name) for key, name in code_keys(to_plain_dict(config)).items()
    }
    record |= {'first': first, 'inputs': {key: fingerprint(value) for key, value in inputs.items()}}
  with open(pathlib.Path(workdir) / RUNS, 'a', encoding='utf-8') as file:
    file.write(json.dumps(record) + '\n')


def _recorded(workdir, *, last=False):
  """Returns the recorded {key: fingerprint} of the inputs of a run; {} if there is no record.

  They are those of its first start, or of its last start if `last`.
  """
  path, inputs = pathlib.Path(workdir) / RUNS, {}
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):  # the process was killed while it wrote the line
      start = json.loads(line)
      if last or start.get('first'):
        inputs = start.get('inputs', {})
  return inputs


def version():
  """Returns the version of the installed package, or None if it is not installed."""
  try:
    return importlib.metadata.version('rlhf_jax')
  except importlib.metadata.PackageNotFoundError:
    return None


def commit():
  """Returns the git commit of this code, with '+' if files differ from it; None without git."""
  folder = pathlib.Path(__file__).parent

  def git(*arguments):
    return subprocess.run(
      ['git', '-C', folder, *arguments], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()

  try:
    return git('rev-parse', 'HEAD') + (
      '+' if git('status', '--porcelain', '--untracked-files=no') else ''
    )
  except (OSError, subprocess.SubprocessError):
    return None
