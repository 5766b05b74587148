"""rlhf evaluate --policies NAME=FOLDER,NAME=FOLDER --prompts FILE --judge JUDGE [--workdir OUT]
rlhf evaluate --workdir RUN [--evals NAMES or JSON]

The first form compares policies without training. All policies respond to the same prompts, and a
judge scores the responses or compares them in pairs. It prints a table with Elo ratings and win
rates over the first policy, and some responses side by side, and writes results.json and
report.html to OUT. FOLDER is a Hugging Face folder or the folder of a run. JUDGE is one of

  MODULE:FUNCTION      f(prompt, response) -> number, a reward function of a batch, or a function
                       f(prompts, responses_a, responses_b) -> numbers from -1 (b is better) to 1
  exact_match:COLUMN   1 if the response equals that column of the prompts, else 0
  FOLDER               a reward model; the response with the higher score wins
  http://HOST:PORT     a server of scores, as for rewards
  feedback:URL#PROJECT people: pairs that nobody judged become tasks of the project

The second form runs the evaluators of a run's config.json on its newest checkpoint. For a finished
run this repeats its last evaluation. --evals=held_out,prompts selects evaluators by name;
--evals='{"text": {"path": "prompts.jsonl"}}' replaces `config.evals`.

python -m rlhf_jax.evaluate does the same.
"""

import json
import pathlib

import jax
import ml_collections

from rlhf_jax import checkpoint
from rlhf_jax import command_line
from rlhf_jax import config_files
from rlhf_jax import errors
from rlhf_jax import loop
from rlhf_jax import processes
from rlhf_jax import runtime
from rlhf_jax import sharding
from rlhf_jax.algorithms import build
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation import tables


def run(workdir, evals=''):
  """Evaluates the newest checkpoint of a run.

  Args:
    workdir: Folder of the run.
    evals: Comma-separated names of evaluators in `config.evals`, or a JSON object that replaces
      `config.evals`; '' for all evaluators.

  Returns:
    The step of the checkpoint, and {'NAME/METRIC': number}.

  Raises:
    UserError: If there is no such run or evaluator, or no checkpoint.
  """
  config = read_config(workdir)
  names = None
  if evals.lstrip().startswith('{'):
    try:
      config.evals = ml_collections.ConfigDict(json.loads(evals))
    except ValueError as error:
      raise errors.UserError(f'--evals={evals} is not JSON: {error}') from error
  elif evals:
    names = evals.split(',')
    config.evals = ml_collections.ConfigDict(
      {name: block for name, block in config.evals.items() if name in names}
    )
  build.validate(config, jax.device_count())
  mesh = sharding.make_mesh(dict(config.mesh))
  with jax.set_mesh(mesh):
    learner, state = build.load(config.algorithm).create(config, mesh)
    unknown = [name for name in names or () if name not in learner.evaluators]
    if unknown:
      raise errors.UserError(
        f'--evals={evals} names {", ".join(unknown)}: the run has no evaluator of this name, or '
        'no data for it'
      )
    learner.prepare(pathlib.Path(workdir))
    checkpoints = checkpoint.Checkpoints(workdir)
    try:
      step, state = checkpoints.restore(state, learner.iterators)
    finally:
      checkpoints.close()
    if not step:
      raise errors.UserError(f'there is no checkpoint in {workdir}/checkpoints')
    return step, loop.evaluate(learner, state, names or list(learner.evaluators))


def read_config(workdir):
  """Returns the config of a run, a ConfigDict.

  Raises:
    UserError: If config.json cannot be read, or belongs to a pipeline.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    config, _ = config_files.of_run(path)
  except OSError as error:
    raise errors.UserError(
      f'{path} cannot be read ({error}): --workdir must be the folder of a run'
    ) from error
  if 'stages' in config:
    raise errors.UserError(
      f'{workdir} is a pipeline: name the folder of a stage, such as {workdir}/{config.stages[0]}'
    )
  return config


def named_folders(text):
  """Parses 'NAME=FOLDER,NAME=FOLDER' into {name: folder}.

  Raises:
    UserError: If the text has another form, or a name occurs twice.
  """
  pairs = [pair.partition('=')[::2] for pair in text.split(',')]
  named = dict(pairs)
  errors.need(
    all(name and folder for name, folder in pairs) and len(named) == len(pairs),
    f'--policies={text!r} must be NAME=FOLDER,NAME=FOLDER with different names',
  )
  return named


def compare(options):
  """Compares policies; see the top of the file.

  Args:
    options: Parsed command line; see `parser`.

  Raises:
    UserError: If an option is wrong or missing.
  """
  named = named_folders(options.policies)
  errors.need(options.prompts, '--prompts is missing: name the data set of prompts')
  errors.need(
    options.judge,
    '--judge is missing: name a function, a column or a reward model; `rlhf evaluate --help` '
    'describes the forms',
  )
  workdir = pathlib.Path(options.workdir or f'runs/compare-{"-".join(named)}')
  errors.need(
    not (workdir / 'config.json').exists(),
    f'--workdir={workdir} holds a run, whose report would be overwritten: name another folder',
  )
  settings = comparison.Settings(
    baseline=options.baseline,
    samples=options.samples,
    best_of=options.best_of,
    seed=options.seed,
    max_new_tokens=options.max_new_tokens,
    temperature=options.temperature,
  )
  policies.compare_folders(
    workdir,
    named,
    prompts=options.prompts,
    judge=options.judge,
    reward_model=options.reward_model,
    settings=settings,
    betas=named_betas(options.betas),
  )


def named_betas(text):
  """Parses 'NAME=BETA,NAME=BETA' into {name: beta}; {} for ''.

  Raises:
    UserError: If the text has another form.
  """
  try:
    pairs = [pair.partition('=')[::2] for pair in text.split(',') if pair]
    return {name: float(beta) for name, beta in pairs}
  except ValueError:
    raise errors.UserError(
      f'--betas={text!r} must be NAME=NUMBER,NAME=NUMBER with names of --policies'
    ) from None


def parser():
  """Returns the parser of the command line."""
  arguments = command_line.Arguments('rlhf evaluate', __doc__)
  add = arguments.add_argument
  add('--policies', default='', help='names and folders of the policies to compare')
  add('--prompts', default='', help='data set of prompts, with the columns that the judge reads')
  add('--judge', default='', help='decides which response is better; see above')
  add('--workdir', default='', help='folder for the results, or of the run to evaluate')
  add('--baseline', default='', help='reference of win rates and KLs; by default the first policy')
  add('--reward_model', default='', help='folder of a reward model, which adds proxy scores')
  add('--samples', type=int, default=0, help='responses per policy; by default one per prompt')
  add('--best_of', type=int, default=0, help='adds best-of-n of the baseline by --reward_model')
  add(
    '--max_new_tokens',
    type=int,
    help='length limit of a response; by default 128, or less if the context is shorter',
  )
  add('--temperature', type=float, default=1.0, help='0 selects the most likely token')
  add('--betas', default='', help='NAME=BETA,...: weights of the Q functions of ILQL policies')
  add('--seed', type=int, default=0, help='random seed of the samples')
  add('--evals', default='', help='evaluators of the run, or a JSON object; by default all')
  return arguments


def start():
  """Reads the command line and prints the table."""
  options = parser().parse_args()
  with command_line.exit_on_error():
    errors.need(
      options.policies or options.workdir,
      'set --policies to compare policies, or --workdir to run the evaluators of a run',
    )
    runtime.configure()
    if options.policies:
      compare(options)
      return
    step, metrics = run(options.workdir, options.evals)
    if processes.is_main_process():
      print(tables.metrics_table(metrics, title=f'{options.workdir} after {step} steps'))


if __name__ == '__main__':
  start()
