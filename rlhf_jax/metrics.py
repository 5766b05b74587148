"""Writes and reads the log files of a run: metrics.jsonl, TensorBoard events, samples.jsonl.

Each line of a `.jsonl` file is flushed, so a killed process loses at most the line that it was
writing. When a run resumes, that line and all lines from the resumed step on are removed.
"""

import json
import math
import os
import pathlib
import resource
import sys
import time
import uuid

from absl import logging
import jax
import tensorboardX

from rlhf_jax import processes
from rlhf_jax.errors import DataError
from rlhf_jax.errors import UserError

METRICS = 'metrics.jsonl'
SAMPLES = 'samples.jsonl'
# Metrics that the progress bar shows, if a run has them, and their labels.
PROGRESS_METRICS = {
  'loss': 'loss',
  'held_out/loss': 'held-out loss',
  'accuracy': 'acc',
  'held_out/accuracy': 'held-out acc',
  'objective/scores': 'score',
  'objective/postprocessed_scores': 'postprocessed_score',
  'objective/kl': 'kl',
  'distillation/reverse_kl': 'reverse KL',
  'response/length': 'len',
}


class Writer:
  """Appends metrics and text samples of a run to its workdir; only on the main process.

  Attributes:
    workdir: pathlib.Path of the folder, created if it does not exist.
  """

  def __init__(self, workdir, *, resume_step=0, wandb_project='', config=None, on_metrics=None):
    """Opens the files of a run.

    Args:
      workdir: Folder of metrics.jsonl, samples.jsonl and tensorboard/.
      resume_step: First step that will be written; existing lines from this step on are removed.
      wandb_project: Weights & Biases project to log to as well, or ''.
      config: Plain dict of settings, shown by Weights & Biases.
      on_metrics: Function of (step, metrics), called after each line of metrics, or None.

    Raises:
      UserError: `wandb_project` is set and wandb is not installed.
      DataError: A line of an earlier start cannot be read.
    """
    self.workdir = pathlib.Path(workdir)
    self._closed = not processes.is_main_process()
    if self._closed:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, SAMPLES):
      _drop_from(self.workdir / name, resume_step)
    self._on_metrics = on_metrics
    self._metrics = open(self.workdir / METRICS, 'a', encoding='utf-8')
    self._samples = open(self.workdir / SAMPLES, 'a', encoding='utf-8')
    # File names count seconds: without the suffix, a quick restart overwrites the events.
    self._tensorboard = tensorboardX.SummaryWriter(
      str(self.workdir / 'tensorboard'),
      purge_step=resume_step,
      filename_suffix=f'.{os.getpid()}.{resume_step}',
    )
    self._wandb = _start_wandb(self.workdir, wandb_project, config) if wandb_project else None

  def write(self, step, metrics):
    """Appends one line `{"step": step, name: value, ...}`; a value that is not finite is null.

    Args:
      step: Train step, counted from 0.
      metrics: Dict from a name to a number, NumPy scalar or JAX scalar.
    """
    if self._closed:
      return
    values = {name: float(value) for name, value in metrics.items()}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    _append(self._metrics, {'step': int(step)} | {name: finite.get(name) for name in values})
    for name, value in finite.items():
      self._tensorboard.add_scalar(name, value, int(step))
    if self._wandb is not None:
      self._wandb.log(finite, step=int(step))
    if self._on_metrics is not None:
      self._on_metrics(int(step), values)

  def samples(self, step, samples):
    """Appends one line `{"step": step, ...}` for each dict of JSON values (texts, scores)."""
    for sample in () if self._closed else samples:
      _append(self._samples, {'step': int(step)} | _nulls(sample))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Flushes and closes every file. A second call does nothing."""
    if self._closed:
      return
    self._closed = True
    self._metrics.close()
    self._samples.close()
    self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()


def take_step(train_step, state, batch, *, timed):
  """Takes a train step and measures its time on the device if `timed`.

  Args:
    train_step: Function (state, *batch) -> (state, metrics).
    state: TrainState, the first argument.
    batch: Tuple of the other arguments.
    timed: Whether to wait for the device, before and after the step.

  Returns:
    The next state, the metrics of the step, and {'seconds/update': number}, or {} if not `timed`.
  """
  if not timed:
    return *train_step(state, *batch), {}
  jax.block_until_ready((state, batch))
  started = time.perf_counter()
  state, metrics = jax.block_until_ready(train_step(state, *batch))
  return state, metrics, {'seconds/update': time.perf_counter() - started}


class StepLog:
  """Logs the metrics of train steps to a Writer and the progress bar, with warnings about them.

  The host reads the metrics of a step only after the next step has been dispatched, so that the
  device never waits for the log.
  """

  def __init__(self, writer, bar, warnings=lambda metrics: {}):
    """Starts the clock of `seconds/step`.

    Args:
      writer: Writer of the run.
      bar: Progress bar of tqdm.
      warnings: Function from metrics to a dict of warnings; see learner.Learner.
    """
    self._writer, self._bar = writer, bar
    self._warnings, self._warned = warnings, set()
    self._clock, self._steps, self._waiting = time.perf_counter(), 0, None

  def add(self, step, metrics, host_metrics, *, written):
    """Logs the previous step, and stores this one until the next call.

    Args:
      step: Train step, counted from 0.
      metrics: Dict from a name to a scalar on the device. Arrays named samples/NAME are not logged.
      host_metrics: Dict from a name to a number.
      written: Whether the Writer gets the metrics of this step; the progress bar always does.

    Raises:
      UserError: A metric of the previous step is NaN or infinite.
    """
    self.flush()
    self._steps += 1
    if written:
      # The mean since the last written step, because the device runs behind the host in between.
      now = time.perf_counter()
      host_metrics = host_metrics | {
        'seconds/step': (now - self._clock) / self._steps,
        'memory/peak_gib': peak_memory() / 2**30,
      }
      self._clock, self._steps = now, 0
    metrics = {name: value for name, value in metrics.items() if not name.startswith('samples/')}
    self._waiting = step, metrics, host_metrics, written

  def flush(self):
    """Waits for the last added step and logs it, unless it is already logged.

    Raises:
      UserError: A metric of the step is NaN or infinite.
    """
    if self._waiting is None:
      return
    (step, metrics, host_metrics, written), self._waiting = self._waiting, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = sorted(name for name, value in values.items() if not math.isfinite(value))
    if bad:
      raise UserError(
        f'{", ".join(bad[:4])} is not finite at step {step}. Lower config.optim.learning_rate, '
        'set config.optim.clip_norm, or check the data; earlier checkpoints are in '
        f'{self._writer.workdir}/checkpoints, and --fork=NEWDIR starts from the last one with '
        'another config.'
      )
    values |= host_metrics
    if 'tokens' in values and 'seconds/update' in values:
      values['tokens_per_second/update'] = values['tokens'] / values['seconds/update']
    self._warn(step, values)
    self._show(values)
    if written:
      self._writer.write(step, values)

  def write(self, step, metrics):
    """Writes a dict of metrics, such as those of an evaluation, immediately, if it is not empty."""
    if metrics:
      self._writer.write(step, metrics)
      self._show(metrics)

  def _warn(self, step, values):
    """Logs the warnings whose kind has not been logged yet."""
    for kind, line in self._warnings(values).items():
      if kind not in self._warned and processes.is_main_process():
        logging.warning('step %d: %s', step, line)
      self._warned.add(kind)

  def _show(self, values):
    shown = {
      short: f'{values[name]:.3g}' for name, short in PROGRESS_METRICS.items() if name in values
    }
    if shown:
      self._bar.set_postfix(shown, refresh=False)


def peak_memory():
  """Returns the peak memory in bytes: the maximum over local devices; on CPU, of this process."""
  used = [(device.memory_stats() or {}).get('peak_bytes_in_use') for device in jax.local_devices()]
  if None not in used:
    return max(used)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
  return peak if sys.platform == 'darwin' else peak * 2**10


def read(workdir):
  """Returns the metrics of a run as a list of dicts, each with a `step`; null becomes NaN.

  The list is empty if there is no file. An incomplete last line is ignored.

  Raises:
    DataError: A line is not JSON.
  """
  records = [record for _, record in _lines(pathlib.Path(workdir) / METRICS)]
  return [
    {name: math.nan if value is None else value for name, value in record.items()}
    for record in records
  ]


def summary(workdir):
  """Returns the last values of the metrics of a run that the progress bar shows, as a text."""
  last = {}
  for record in read(workdir):
    last |= record
  return ', '.join(
    f'{short} {last[name]:.3g}' for name, short in PROGRESS_METRICS.items() if name in last
  )


def read_samples(workdir):
  """Returns the text samples of a run as a list of dicts, each with a `step`; [] without a file."""
  return [record for _, record in _lines(pathlib.Path(workdir) / SAMPLES)]


def _append(file, record):
  file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + '\n')
  file.flush()


def _nulls(value):
  """Returns the value with None for each float that is not finite, which JSON does not have."""
  if isinstance(value, dict):
    return {key: _nulls(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_nulls(item) for item in value]
  if hasattr(value, 'item'):
    return _nulls(value.item())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path):
  """Yields (line, record) for each line; an incomplete last line is left out."""
  if not path.exists():
    return
  with open(path, encoding='utf-8', errors='replace', newline='\n') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith('\n'):
        return
      try:
        record = json.loads(line)
        record['step']
      except (ValueError, KeyError, TypeError):
        raise DataError(
          f'{path}:{number}: not a JSON object with a "step"; delete the line to continue'
        ) from None
      yield line, record


def _drop_from(path, step):
  """Removes the lines of a file from `step` on."""
  if not path.exists():
    return
  lines = ''.join(line for line, record in _lines(path) if record['step'] < step)
  temporary = path.with_suffix('.tmp')
  with open(temporary, 'w', encoding='utf-8', newline='\n') as file:
    file.write(lines)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _start_wandb(workdir, project, config):
  """Starts the Weights & Biases run of a workdir, or continues it if the workdir has one."""
  try:
    import wandb
  except ImportError:
    raise UserError(
      f'wandb_project={project!r} needs the package wandb: pip install wandb; or leave it empty'
    ) from None
  path = workdir / 'wandb_id'
  if not path.exists():
    path.write_text(uuid.uuid4().hex[:8])
  return wandb.init(
    project=project, id=path.read_text().strip(), resume='allow', dir=str(workdir), config=config
  )
