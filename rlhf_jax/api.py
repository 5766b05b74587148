"""RLHF from Python, for notebooks and scripts: `import rlhf_jax as rl`.

    policy = rl.load('FOLDER')
    print(policy.sample(['Review of the kettle:']).responses)
    run = rl.train(policy, prompts=['Review of the kettle:'], reward_fn=brevity, steps=50)
    run.metrics, run.plot(), run.samples, run.report()
    rl.compare({'before': policy, 'after': run}, prompts=prompts, judge=brevity)

`train` uses the same base configs as `rlhf run`. config.json in the folder of the run holds every
setting, and each of the two can resume a run that the other started.
"""

import collections.abc
import contextlib
import functools
import importlib
import json
import math
import numbers
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import folders
from rlhf_jax import identity
from rlhf_jax import loop as loop_lib
from rlhf_jax import metrics as metrics_lib
from rlhf_jax import models
from rlhf_jax import policy as policy_lib
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import setup
from rlhf_jax.data import formats
from rlhf_jax.data import stored
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import judges
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation import reward_models
from rlhf_jax.models import hf
from rlhf_jax.rewards import functions
from rlhf_jax.rewards import labels

# Data arguments of `train` that each algorithm takes. If `algorithm` is None, `train` uses the
# first algorithm that takes the given argument.
DATA = {
  'ppo': ('prompts',),
  'a2c': ('prompts',),
  'nlpo': ('prompts',),
  'online_dpo': ('prompts',),
  'trpo': ('prompts',),
  'grpo': ('prompts',),
  'reinforce': ('prompts',),
  'rloo': ('prompts',),
  'sft': ('samples', 'texts'),
  'ilql': ('samples',),
  'reward_model': ('comparisons',),
  'dpo': ('comparisons',),
  'distillation': ('prompts', 'samples'),
}
# Field of a record that holds the text, if a record is given as a string.
FIELD = {'prompts': 'prompt', 'texts': 'text'}
VOCABULARY = 1024  # default vocabulary size of a tokenizer that is trained on `texts`


def load(path):
  """Loads a policy or a reward model.

  Args:
    path: Hugging Face folder, or the folder of a run. If the run is unfinished, the policy of its
      newest checkpoint is loaded.

  Returns:
    policy.TextPolicy, or reward_models.RewardModel if the folder holds one.

  Raises:
    UserError: If there is no model in the folder, or it cannot be read.
  """
  path = pathlib.Path(path)
  finished = (path / 'model').is_dir() or not (path / 'checkpoints').is_dir()
  if finished and setup.is_reward_model(path):
    return reward_models.RewardModel.load(path)
  return policy_lib.TextPolicy.load(path)


def train(
  policy=None,
  *,
  prompts=None,
  samples=None,
  comparisons=None,
  texts=None,
  reward_fn=None,
  algorithm=None,
  preset='',
  steps=None,
  seed=0,
  workdir=None,
  overrides=None,
):
  """Trains a model, or resumes an earlier call with the same arguments and `workdir`.

  Data are a list, a pandas DataFrame, a datasets.Dataset, or the path of a data set; or a dict
  {name: (data, weight)} of several, which are drawn by weight. docs/data.md lists the fields of
  records. Set exactly one of `prompts`, `samples`, `comparisons` and `texts`.

  Args:
    policy: Initial model: a model from `load`, a Run, or a folder. None for a new model, whose
      shape `overrides` must give as model.init.
    prompts: Prompts for on-policy RL or distillation: strings or records. The reward function
      receives the other fields of the records as metadata.
    samples: Prompts with completions, for SFT or for distillation with preset='offline' or 'gkd'
      (by default it uses only the prompts); with rewards too, for ILQL.
    comparisons: Better and worse completions, for a reward model.
    texts: Documents for language modelling: strings or records.
    reward_fn: Reward of on-policy RL, or of the samples of ILQL if they have none: a function
      (prompts, responses) -> one number per response (see rewards/functions.py), or its name
      'module:function'; a reward model from `load`, its Run or its folder.
    algorithm: Name of an algorithm, such as 'ppo', 'grpo', 'sft' or 'reward_model', or the dotted
      path of a module. None for PPO with prompts, a reward model with comparisons, else SFT.
    preset: Preset of the algorithm's config; '' for the default.
    steps: Number of train steps; None for the base config's.
    seed: Random seed of parameters, data order and samples.
    workdir: Folder of the run; None for a new temporary folder, whose path is printed.
    overrides: {config key: value}, such as {'rl.kl_coef': 0.05, 'batch_size': 64}. `rlhf run
      --config=ALGORITHM --help` lists the keys.

  Returns:
    Run. After Ctrl-C, the run so far, which the same call with this `workdir` resumes.

  Raises:
    UserError: If an argument, the data or a config key is wrong; the message names it.
    KeyboardInterrupt: After Ctrl-C before the first step, or a second Ctrl-C.
  """
  kind, data = _only_argument(
    {'prompts': prompts, 'samples': samples, 'comparisons': comparisons, 'texts': texts}
  )
  algorithm = algorithm or next(name for name, kinds in DATA.items() if kind in kinds)
  kinds = DATA.get(algorithm, (kind,))
  errors.need(kind in kinds, f'algorithm={algorithm!r} takes {" or ".join(kinds)}, not {kind}')
  runtime.hide_library_logs()
  if workdir is None:
    workdir = tempfile.mkdtemp(prefix='rlhf_jax_')
    processes.print_on_main(f'writing the run to {workdir}; to resume it, pass this as workdir')
  workdir = pathlib.Path(workdir).absolute()
  config = _base_config(algorithm, preset, seed)
  if steps is not None:
    config.steps, config.data.epochs = steps, None
  if algorithm == 'sft':
    config.data.kind = 'text' if kind == 'texts' else 'completion'
  _set_data(config.data, data, kind, workdir)
  config_files.override(config, overrides or {})
  if policy is not None:
    config.model.path = _model_path(policy, workdir)
  elif not config.model.path:
    config.tokenizer = config.tokenizer or _new_tokenizer(config, kind, workdir)
  _fit_lengths(config, overrides or {})
  with contextlib.ExitStack() as stack:
    if reward_fn is None:
      errors.need(
        kind != 'prompts' or 'reward' not in config or labels.has_source(config.reward),
        f'algorithm={algorithm!r} needs a reward_fn: a function (prompts, responses), a reward '
        'model or its folder; or set a key of config.reward in overrides',
      )
    else:
      errors.need('reward' in config, f'algorithm={algorithm!r} takes no reward_fn')
      stack.enter_context(_set_reward(config.reward, reward_fn))
    on_metrics = stack.enter_context(plots.live())
    try:
      loop_lib.run(config.lock(), workdir, on_metrics=on_metrics)
    except KeyboardInterrupt as stop:
      if not (workdir / identity.CONFIG).exists():
        raise KeyboardInterrupt(f'stopped before the first step: {workdir} holds no run') from stop
      if not isinstance(stop, errors.Interrupted):
        raise
      processes.print_on_main(str(stop))
  run = Run(workdir)
  if processes.is_main_process() and (workdir / metrics_lib.METRICS).exists():
    run.report()
  return run


class Run:
  """Metrics, samples, model and report of a run, read from its folder.

  Attributes:
    workdir: Folder of the run, a pathlib.Path.
  """

  def __init__(self, workdir):
    self.workdir = pathlib.Path(workdir)
    errors.need((self.workdir / 'config.json').exists(), f'{workdir} is not the folder of a run')

  def __repr__(self):
    state = 'stopped' if self.stopped else 'finished'
    return f'Run({str(self.workdir)!r}, {state}: {metrics_lib.summary(self.workdir)})'

  @property
  def config(self):
    """The config of the run, a dict."""
    return json.loads((self.workdir / 'config.json').read_text())

  @property
  def stopped(self):
    """Whether the run stopped before its last step."""
    return not (self.workdir / 'model').exists()

  @property
  def metrics(self):
    """The logged metrics, a pandas DataFrame with one row per logged step.

    docs/metrics.md explains the columns.
    """
    import pandas

    merged = {}  # metrics.jsonl has separate records for the training and evaluation of a step
    for record in metrics_lib.read(self.workdir):
      merged[record['step']] = merged.get(record['step'], {}) | record
    return pandas.DataFrame(list(merged.values()), columns=None if merged else ['step']).set_index(
      'step'
    )

  @property
  def samples(self):
    """The logged samples, a pandas DataFrame with columns such as step, prompt, response, score."""
    import pandas

    return pandas.DataFrame(metrics_lib.read_samples(self.workdir))

  @functools.cached_property
  def model(self):
    """The trained policy or reward model; if the run stopped, its newest checkpoint's policy."""
    return load(self.workdir)

  @property
  def policy(self):
    """The trained policy, a TextPolicy.

    Raises:
      UserError: If the run trains a reward model.
    """
    is_reward_model = isinstance(self.model, reward_models.RewardModel)
    errors.need(
      not is_reward_model, f'{self.workdir} trains a reward model, not a policy: use run.model'
    )
    return self.model

  def score(self, prompts, responses):
    """Returns the trained reward model's scores [n] of n responses.

    Raises:
      UserError: If the run trains a policy.
    """
    is_reward_model = isinstance(self.model, reward_models.RewardModel)
    errors.need(is_reward_model, f'{self.workdir} trains a policy, which gives no scores')
    return self.model.score(prompts, responses)

  def plot(self, names=None):
    """Draws metrics over steps.

    Args:
      names: Names of metrics; None for the most important metrics of the run.

    Returns:
      matplotlib Figure, which notebooks display.
    """
    return plots.figure(metrics_lib.read(self.workdir), names)

  def report(self):
    """Writes report.html and returns its path; notebooks display the page."""
    return Report(report.of_run(self.workdir, title=self.config['algorithm']))


class Report(type(pathlib.Path())):
  """Path of a report; notebooks display the page itself."""

  def _repr_html_(self):
    # In single quotes only these need an escape; html.escape would add half of the page's size.
    page = self.read_text(encoding='utf-8').replace('&', '&amp;').replace("'", '&#39;')
    return f"<iframe sandbox='allow-scripts' srcdoc='{page}' width='100%' height='600'></iframe>"


def compare(
  policies, *, prompts, judge, baseline='', samples=0, max_new_tokens=None, temperature=1.0, seed=0
):
  """Compares policies on the same prompts: scores, win rates with intervals, Elo ratings.

  Args:
    policies: {name: model from `load`, Run, or folder}.
    prompts: Prompts, as for `train`. The judge receives the other fields as metadata.
    judge: A function (prompts, responses) -> scores, or another form that evaluation/judges.py
      describes, such as a pairwise judge; a reward model, its Run, or its folder;
      'exact_match:COLUMN'; or 'module:function'.
    baseline: Name of the policy that win rates and KLs are relative to; '' for the first.
    samples: Number of responses per policy; prompts repeat if there are fewer. 0 for one response
      to each prompt.
    max_new_tokens: Maximum number of tokens of a response; None for 128, or less if the context is
      shorter.
    temperature: Sampling temperature; 0 selects the most likely token.
    seed: Random seed of the samples.

  Returns:
    comparison.Comparison with `table`, `responses` and `plot()`. Notebooks display it as a table.

  Raises:
    UserError: If a policy or the judge cannot be loaded, or the judge fails.
  """
  errors.need(policies, 'policies is empty: give {name: policy}')
  loaded = {name: _model(policy) for name, policy in policies.items()}
  for name, policy in loaded.items():
    errors.need(
      isinstance(policy, policy_lib.TextPolicy),
      f'policies[{name!r}] is a reward model: it must be a policy',
    )
  first = next(iter(loaded.values()))
  if isinstance(prompts, (str, os.PathLike)):
    examples = first.read_examples(os.fspath(prompts))
  else:
    records = [
      stored.Record(fields, f'prompts: record {number}')
      for number, fields in enumerate(_records(prompts, 'prompts'), 1)
    ]
    examples = list(formats.prompts(records, tokenizer=first.tokenizer)[0])
  settings = comparison.Settings(
    baseline=baseline,
    samples=samples,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    seed=seed,
  )
  judge = judge.model if isinstance(judge, Run) else judge
  judge = judges.load(os.fspath(judge) if isinstance(judge, os.PathLike) else judge)
  return comparison.compare_policies(loaded, examples, judge, settings)


def _only_argument(given):
  """Returns the name and value of the only data argument that is not None."""
  present = [name for name, value in given.items() if value is not None]
  errors.need(
    len(present) == 1,
    f'set exactly one of {", ".join(given)} (now {", ".join(present) or "none"})',
  )
  return present[0], given[present[0]]


def _base_config(algorithm, preset, seed):
  """Returns the config of an algorithm's config file, or of its module if there is no file."""
  if algorithm in config_files.names():
    arguments = [f'seed={seed}'] + ([f'preset={preset}'] if preset else [])
    return config_files.read(config_files.find(algorithm), ','.join(arguments))
  config = build.load(algorithm).config(preset)
  config.seed = seed
  return config


def _fit_lengths(config, overrides):
  """Lowers the default lengths of prompts, responses and examples to the model's context.

  Args:
    config: Config of the run, changed in place.
    overrides: {config key: value} that the caller set; these keys keep their values.
  """
  if config.model.path:
    model = hf.read_model(folders.find_model(config.model.path))
  else:
    model = models.create({'vocab_size': 1} | config.model.init.to_dict())
  context = model.max_length
  halves = context if model.encoder_decoder else context // 2
  for key, longest in (
    ('data.max_length', context),
    ('data.max_prompt_length', halves),
    ('sampling.max_new_tokens', halves),
  ):
    block, name = key.split('.')
    if key not in overrides and name in config.get(block, {}) and config[block][name] > longest:
      config[block][name] = longest
      processes.print_on_main(f"config.{key}={longest}, to fit the model's context of {context}")


def _model(model):
  """Returns the model of a Run or a folder; returns a loaded model unchanged."""
  if isinstance(model, Run):
    return model.model
  return load(model) if isinstance(model, (str, os.PathLike)) else model


def _model_path(model, workdir, argument='policy'):
  """Returns the folder of a model that is an argument of `train`. Saves it if it has no folder."""
  if isinstance(model, (str, os.PathLike)):
    return os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
  if isinstance(model, Run) and not model.stopped:
    return str((model.workdir / 'model').absolute())
  model = _model(model)
  errors.need(
    isinstance(model, (policy_lib.TextPolicy, reward_models.RewardModel)),
    f'{argument} is of type {type(model).__name__}: it must be a model from load(), a Run or a '
    'folder',
  )
  if model.path is None:
    model.save(_inputs(workdir) / 'model')
  return str(pathlib.Path(model.path).absolute())


def _new_tokenizer(config, kind, workdir):
  """Trains a tokenizer on the run's texts, unless it exists, and returns its folder."""
  errors.need(
    config.model.init and kind == 'texts',
    'policy=None needs texts, to train a tokenizer on, and model.init in overrides, '
    "such as {'model.init': {'family': 'llama', 'hidden_size': 128, ...}}; or give a policy",
  )
  folder = _inputs(workdir) / 'tokenizer'
  if not folder.exists():
    examples = setup.read_examples(config.data, formats.texts, None)
    whole = (x if isinstance(x, str) else x.prompt + x.completion for x in examples)
    size = config.model.init.get('vocab_size', VOCABULARY)
    tokenizers.train_bpe(whole, size, str(folder))
  return str(folder)


@contextlib.contextmanager
def _set_reward(config_reward, reward_fn):
  """Sets `config.reward`. While the `with` block runs, the reward function can be found by name."""
  is_text = isinstance(reward_fn, str) and not os.path.isdir(reward_fn)
  name = reward_fn if is_text and judges.names_function(reward_fn) else ''
  is_model = not callable(reward_fn) or isinstance(reward_fn, (Run, reward_models.RewardModel))
  if is_model and not name:
    config_reward.model = _model_path(reward_fn, None, 'reward_fn')
    yield
    return
  name = name or _importable(reward_fn)
  if name:
    config_reward.function = name
    yield
    return
  config_reward.function = f'{functions.IN_MEMORY}{getattr(reward_fn, "__name__", "reward_fn")}'
  with functions.in_memory({config_reward.function: reward_fn}):
    yield


def _importable(function):
  """Returns 'module:name' if another process can import the function, else ''."""
  module, name = getattr(function, '__module__', None), getattr(function, '__qualname__', '')
  if module in (None, '__main__') or not name.isidentifier():
    return ''
  found = getattr(sys.modules.get(module), name, None)
  return f'{module}:{name}' if found is function and importlib.util.find_spec(module) else ''


def _inputs(workdir):
  """Creates and returns the folder in the run's folder for arguments that were given in memory."""
  folder = workdir / '.inputs'
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def _set_data(config_data, data, kind, workdir):
  """Sets the path of the data, or the mixture if they are a dict {name: (data, weight)}."""
  if type(data) is not dict:
    config_data.path = _data_path(data, kind, workdir)
    return
  errors.need(
    data and all(isinstance(source, tuple) and len(source) == 2 for source in data.values()),
    f'{kind} is a dict: it must have the form {{name: (data, weight)}}',
  )
  for name, (_, weight) in data.items():
    errors.need(
      isinstance(name, str) and re.fullmatch(r'[\w-]+', name),
      f'{kind}: the name {name!r} of a source may have letters, digits, _ and - only',
    )
    errors.need(
      isinstance(weight, numbers.Real),
      f'{kind}: the weight {weight!r} of source {name!r} must be a number',
    )
  config_data.mixture = {
    name: {'path': _data_path(source, kind, workdir, name), 'weight': float(weight)}
    for name, (source, weight) in data.items()
  }


def _data_path(data, kind, workdir, name=''):
  """Returns the path of a data set. Writes data that were given in memory as JSONL.

  Args:
    data: Path or records.
    kind: Name of the argument of `train`.
    workdir: Folder of the run.
    name: Name of the source in a mixture, or ''.
  """
  if isinstance(data, (str, os.PathLike)):
    return os.fspath(data)
  path = _inputs(workdir) / f'{"-".join(filter(None, [kind, name]))}.jsonl'
  lines = []
  for number, record in enumerate(_records(data, kind), 1):
    try:
      lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain) + '\n')
    except (TypeError, ValueError) as error:
      raise errors.UserError(
        f'{kind}: record {number} cannot be written as JSON: {error}'
      ) from None
  path.write_text(''.join(lines), encoding='utf-8')
  return str(path)


def _records(data, kind):
  """Returns the records of a list, DataFrame or Dataset as dicts without missing values."""
  if hasattr(data, 'to_dict') and hasattr(data, 'columns'):  # pandas
    data = data.to_dict('records')
  errors.need(
    isinstance(data, collections.abc.Iterable) and not isinstance(data, dict),
    f'{kind} is of type {type(data).__name__}: it must be a list, a DataFrame, a Dataset or a path',
  )
  records = []
  for number, record in enumerate(data, 1):
    if isinstance(record, str) and kind in FIELD:
      record = {FIELD[kind]: record}
    if not isinstance(record, dict):
      text = ' or a string' if kind in FIELD else ''
      raise errors.UserError(
        f'{kind}: record {number} is of type {type(record).__name__}: it must be a dict{text}'
      )
    records.append({str(name): value for name, value in record.items() if not _missing(value)})
  return records


def _missing(value: Any) -> bool:
  return value is None or isinstance(value, float) and math.isnan(value)


def _plain(value):
  """Converts a NumPy scalar or array for json.dumps."""
  if hasattr(value, 'tolist'):
    return value.tolist()
  raise TypeError(f'JSON has no type for {type(value).__name__}')
