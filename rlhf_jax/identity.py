"""What a workdir's run is: its config, its input files, and every start of it.

A workdir belongs to one config. `config.json` holds it, `runs.jsonl` has a line for every start.
A start with another config names the keys that differ and stops, unless all of them are in
MAY_CHANGE; so do input files whose contents have changed.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, NamedTuple

from rlhf_jax import errors
from rlhf_jax import folders

CONFIG = 'config.json'
RUNS = 'runs.jsonl'
ABSENT = '(absent)'
# Keys that a run may be resumed with another value of, and why; all keys below them too.
MAY_CHANGE = {
  'steps': 'how long it trains',
  'data.epochs': 'how long it trains',
  'log_every': 'what is written, not what is trained',
  'samples_every': 'what is written, not what is trained',
  'evals': 'what is measured, not what is trained',
  'warn': 'what is said, not what is trained',
  'wandb_project': 'where it is shown',
  'checkpoint_every': 'when it is saved',
  'checkpoint_minutes': 'when it is saved',
  'keep_checkpoints': 'what is kept',
  'mesh': 'where it is computed; sums agree up to rounding',
  'microbatch_size': 'how it is cut; sums agree up to rounding',
  'model.remat': 'how it is computed',
  'model.unroll': 'how it is compiled',
  'rl.length_buckets': 'how it is cut; sums agree up to rounding',
  'sampling.gather_weights': 'how it is computed',
  'sampling.max_concurrent': 'how it is computed; the responses are the same',
  'reward.timeout': 'how long it waits',
}
LENGTH_KEYS = ('steps', 'data.epochs')
# Keys that say what an optimizer holds; a fork in which one of them differs starts with new ones.
OPTIMIZERS = ('optim.name', 'optim.ema', 'optim.master_dtype', 'optim.moment_dtype')
# Keys that name files: they may move, but must hold the same.
INPUTS = ('tokenizer', 'reference', 'model', 'models')
WHOLE = 2**26  # bytes up to which a file counts whole
ENDS = 2**20  # bytes at either end of a larger file that count


class Change(NamedTuple):
  """A key that differs: dotted, without 'config.', with its values as JSON has them."""

  key: str
  before: Any
  after: Any

  def __str__(self):
    return f'config.{self.key}: {_short(self.before)} -> {_short(self.after)}'


def _short(value):
  text = value if value == ABSENT else repr(value)
  return text if len(text) <= 120 else text[:117] + '...'


def to_plain_dict(config):
  """A config as JSON has it: a dict, lists for tuples."""
  return json.loads(json.dumps(config.to_dict()))


def read(workdir):
  """config.json of a workdir, a dict; None where there is none.

  Raises:
    UserError: it is not JSON.
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
  """A recorded config with defaults for the keys that the version which wrote it did not have.

  Args:
    before: config.json of a run as a dict, or None.
    defaults: config of the run's algorithm with its defaults, a dict.

  Returns:
    A dict with the keys of both; `before` as it is if it is of another algorithm or None.
  """
  if before is None or before.get('algorithm') != defaults.get('algorithm'):
    return before
  return _completed(before, defaults)


def _completed(before, defaults):
  found = defaults | before
  for key, default in defaults.items():
    # An evaluator is there or not: 'evals' is set as a whole.
    if key != 'evals' and isinstance(default, dict) and isinstance(before.get(key), dict):
      found[key] = _completed(before[key], default)
  return found


def changes(before, after, prefix=''):
  """The keys that differ between two dicts of JSON; None is as good as absent.

  Args:
    before: nested dict.
    after: nested dict.
    prefix: of the keys' names.

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
  """Whether two values are: true is not 1, and None is as good as absent."""
  old, new = (None if value is ABSENT else value for value in (old, new))
  return isinstance(old, bool) == isinstance(new, bool) and old == new


def may_change(key):
  """Whether a run may be resumed with another value of a dotted key."""
  return any(key == name or key.startswith(f'{name}.') for name in MAY_CHANGE)


def has_checkpoint(workdir):
  """Whether there is a checkpoint in a workdir."""
  saved = pathlib.Path(workdir) / 'checkpoints'
  return saved.is_dir() and any(entry.name.isdigit() for entry in saved.iterdir())


def check(config, workdir, defaults):
  """Compares a config with that of the run in `workdir`.

  Args:
    config: ConfigDict of a single run.
    workdir: folder.
    defaults: see `completed`.

  Returns:
    List of Change that the run may be resumed with; [] for a new one.

  Raises:
    UserError: other keys differ, or input files hold something else; names all of them.
  """
  before = completed(read(workdir), defaults)
  finished = (pathlib.Path(workdir) / 'model').exists()
  if before is None and (finished or has_checkpoint(workdir)):
    raise errors.UserError(f'{workdir} holds a run without its {CONFIG}: name another --workdir')
  if not finished and not has_checkpoint(workdir):
    return []  # nothing that another config could start from
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
      'Put back what was there, or name another --workdir; nothing was changed.'
    )
  return allowed


def changed_code(config, workdir):
  """Keys of user code, such as 'reward.function', whose file has changed since the last start."""
  last = _recorded(workdir, last=True)
  return [
    key
    for key, name in code_keys(to_plain_dict(config)).items()
    if last.get(key) not in (None, fingerprint(code_file(name)))
  ]


def explain_refusal(refused, workdir, *, finished=False, pipeline=False):
  """What to say of keys that differ.

  Args:
    refused: list of Change.
    workdir: folder of the run.
    finished: whether the run is.
    pipeline: whether it is a pipeline of stages.
  """
  listed = '; '.join(map(str, refused))
  if pipeline:
    remedy = (
      'to repeat a stage, delete its folder and those of the stages after it; or add '
      '--fork=NEWDIR to keep this run and take over the stages before'
    )
  else:
    remedy = 'or add --fork=NEWDIR to start there from the last checkpoint of this run'
    remedy += ', with more steps' if finished else ''
  return (
    f'{workdir} {"is finished" if finished else "was started"} with another config: {listed}. '
    f'Name another --workdir; {remedy}. Nothing was changed.'
  )


def input_keys(config, prefix=''):
  """{dotted key: value} of the keys that name files or folders."""
  values = {}
  for key, value in config.items():
    if isinstance(value, dict):
      values |= input_keys(value, f'{prefix}{key}.')
    elif value and (key.endswith('path') or key in INPUTS) and isinstance(value, (str, list)):
      values[f'{prefix}{key}'] = value
  return values


def code_keys(config, prefix=''):
  """{dotted key: 'module' or 'module:name'} of the keys that name code of the user's."""
  names = {}
  for key, value in config.items():
    if isinstance(value, dict):
      names |= code_keys(value, f'{prefix}{key}.')
    elif isinstance(value, str) and (key == 'function' or key == 'algorithm' and '.' in value):
      names[f'{prefix}{key}'] = value
  return names


def code_file(name):
  """The file of a module, or of 'module:name'; the name itself where there is none."""
  try:
    return importlib.util.find_spec(name.partition(':')[0]).origin
  except (ImportError, AttributeError, ValueError):
    return name


def fingerprint(value):
  """A hash of what a path holds, or of the name itself where it is no path; of a list, of all.

  Of the folder of a run its model counts, of files above 64 MiB the size and the first and last MiB.
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
        digest.update(opened.read(WHOLE if size <= WHOLE else ENDS))
        if size > WHOLE:
          opened.seek(-ENDS, os.SEEK_END)
          digest.update(opened.read())
  return digest.hexdigest()[:16]


def _model(path):
  try:
    return folders.model(path) if path.is_dir() else path
  except errors.UserError:
    return path


def check_steps(config, steps, step, workdir, *, forked):
  """Raises UserError where a run has taken more steps already than its config asks for.

  Args:
    config: ConfigDict.
    steps: that the config asks for.
    step: finished ones.
    workdir: folder.
    forked: whether this is the first start of a fork, which must take a step.
  """
  if step >= steps and forked:
    raise errors.UserError(
      f'the checkpoint that {workdir} starts from is after step {step}, and the config asks for {steps} steps '
      f'in all: set config.steps above {step}'
    )
  if step > steps:
    length = f'steps={config.steps}' if config.steps else f'data.epochs={config.data.epochs}'
    raise errors.UserError(
      f'config.{length}, which is {steps} steps, but the checkpoint in {workdir} is after step '
      f'{step}: ask for as many or more, or name another --workdir'
    )


def record_start(config, workdir, *, changed, step=None, forked_from=None):
  """Writes config.json where it is new or has changed, and a line to runs.jsonl.

  Args:
    config: ConfigDict.
    workdir: folder.
    changed: list of Change since the last start.
    step: finished steps that this start resumes from; None of a pipeline.
    forked_from: {'workdir', 'step'} of the run it starts from; None for what config.json says.
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
  """Writes a JSON file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2))
  os.replace(temporary, path)


def _append_start(config, workdir, *, step, changed, first):
  """Appends a line to runs.jsonl: when, where, with which code, and what was overridden.

  Args:
    config: ConfigDict.
    workdir: folder.
    step: finished steps that this start resumes from.
    changed: list of Change since the start before.
    first: whether the run begins here, at step 0 or at that of a fork.
  """
  record = {
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'step': step,
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'version': _version(),
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
  """{key: fingerprint} of the start at which the run began, or of the last; {} where it is not known."""
  path, inputs = pathlib.Path(workdir) / RUNS, {}
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):  # a start that was killed while it wrote
      start = json.loads(line)
      if last or start.get('first'):
        inputs = start.get('inputs', {})
  return inputs


def _version():
  try:
    return importlib.metadata.version('rlhf_jax')
  except importlib.metadata.PackageNotFoundError:
    return None


def commit():
  """The git commit of this code, with '+' where files were changed; None where it is no checkout."""
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
