"""README and docs: links lead somewhere, commands parse, and the way of a newcomer runs."""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import pytest

import rlhf_jax as rl
from rlhf_jax import cli
from rlhf_jax import config_files
from rlhf_jax import evaluate
from rlhf_jax import models
from rlhf_jax.algorithms import build
from rlhf_jax.data import tokenizers
from rlhf_jax.evaluation import glossary
from rlhf_jax.models import hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *sorted(path for path in (ROOT / 'docs').rglob('*.md') if '_build' not in path.parts),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ALGORITHMS = tuple(map(build.load, build.names()))
# Commands of other programs, which a page may name.
OTHERS = ('git', 'pip', 'hf', 'cp', 'make', 'sbatch', 'kubectl')
PROGRAMS = {
  'rlhf_jax.main': 'run',
  'rlhf_jax.generate': 'generate',
  'rlhf_jax.evaluate': 'evaluate',
  'rlhf_jax.report': 'report',
  'planner': 'plan',
}


@functools.cache
def blocks(page):
  """(language, text) of the fenced blocks of a page."""
  return re.findall(r'^```(\S*)\n(.*?)^```$', page.read_text(), re.M | re.S)


@functools.cache
def prose(page):
  """The text of a page outside of fenced blocks."""
  return re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.M | re.S)


@functools.cache
def anchors(page):
  """Anchors of the headings of a page, as GitHub and the site make them."""
  found = set()
  for heading in re.findall(r'^#+ (.*)$', prose(page), re.M):
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower()
    found.add(re.sub(r'[^\w\- ]', '', text).strip().replace(' ', '-'))
  if page.name == 'metrics.md':
    found |= {metric.anchor for metric in glossary.METRICS}
  return found


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
  dead = []
  for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    if re.match(r'https?:|mailto:', target):
      continue
    name, _, anchor = target.partition('#')
    path = (page.parent / name).resolve() if name else page
    if path.suffix == '.ipynb':  # the build copies them to docs/tutorials
      path = ROOT / 'notebooks' / path.name
    if not path.exists() or anchor and path.suffix == '.md' and anchor not in anchors(path):
      dead.append(target)
  assert not dead


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_files_of_the_code_that_pages_name_exist(page):
  named = re.findall(
    r'`((?:rlhf_jax|tests|configs|launch|tools|docs|benchmarks|planner)/[\w./]*)`', prose(page)
  )
  assert not [name for name in named if not (ROOT / name).exists() and '_build' not in name]


@pytest.fixture(scope='module')
def keys():
  """The dotted keys of all algorithms, and their blocks."""
  found = set()

  def add(block, prefix):
    for name in block:
      found.add(prefix + name)
      if isinstance(block[name], ml_collections.ConfigDict):
        add(block[name], f'{prefix}{name}.')

  for algorithm in ALGORITHMS:
    add(algorithm.config(), '')
  return found


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_config_keys_that_pages_name_exist(page, keys):
  text = prose(page)
  if page.name == 'coming_from.md':  # the first column has the names of others
    text = re.sub(r'^\|[^|]*\|', '|', text, flags=re.M)
  tops = '|'.join({key.partition('.')[0] for key in keys if '.' in key})
  named = re.findall(rf'`(?:--config\.|config\.)?((?:{tops})\.\w+(?:\.\w+)*)[`=]', text)
  api = {f'rl.{name}' for name in rl.__all__}  # `import rlhf_jax as rl`
  named = [key for key in named if not re.search(r'^evals|\.py$', key)]
  assert not [key for key in named if key not in keys | api]


def commands(page):
  """The commands of a page, as lists of words: shell blocks, and code in the text."""
  texts = [text for language, text in blocks(page) if language == 'sh']
  inline = re.findall(r'`((?:rlhf|python -m) [^`]+)`', prose(page))
  for text in [*texts, *(text.replace('\n', ' ') for text in inline)]:
    pending = ''
    for line in text.replace('\\\n', ' ').splitlines():
      pending += line
      try:
        words = shlex.split(pending, comments=True)
      except ValueError:  # the quotation ends in a later line
        pending += '\n'
        continue
      pending = ''
      while words and re.match(r'[A-Z_]+=', words[0]):  # variables in front
        words = words[1:]
      if words:
        yield words
    assert not pending


@pytest.mark.parametrize('page', PAGES, ids=NAMES)
def test_commands_parse(page, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'docs')  # my_reinforce.py, which a page copies
  for words in commands(page):
    try:
      parse(words)
    except (SystemExit, Exception) as error:
      raise AssertionError(f'{shlex.join(words)}: {error}') from error


def parse(words):
  """Parses a command without running it; raises an error or exits if it is wrong."""
  program, *arguments = words
  if program == 'launch/local.sh':
    return parse(arguments[arguments.index('--') + 1 :])
  if program.endswith('python') and arguments[0] == '-m':
    module, arguments = arguments[1], arguments[2:]
    assert (
      (ROOT / f'{module.replace(".", "/")}.py').exists()
      or (ROOT / module.replace('.', '/')).is_dir()
      or module in ('pytest', 'pip', 'pre_commit')
    ), module
    program = PROGRAMS.get(module)
  elif program == 'rlhf':
    program, arguments = arguments[0], arguments[1:]
    assert program in cli.COMMANDS
  elif program == 'make':
    targets = [word for word in arguments if '=' not in word]
    assert all(re.search(rf'^{name}:', (ROOT / 'Makefile').read_text(), re.M) for name in targets)
  elif '/' in program and not program.startswith('.venv'):
    assert (ROOT / program).exists()
  else:
    assert program in OTHERS or program.startswith('.venv'), 'what program is this?'
  check_arguments(program, arguments)


def check_arguments(program, arguments):
  """Checks the arguments of a command of ours; those of other programs are not known."""
  if any(re.fullmatch(r'(--config=)?(\.\.\.|[A-Z]+|runs/\S+)', argument) for argument in arguments):
    return  # the reader fills it in, or it is of a run
  options = [argument for argument in arguments if argument.startswith('--config')]
  if options:
    parse_config(options)
  if program == 'evaluate':
    evaluate.parser().parse_args(arguments)
  files = {
    'run': 'rlhf_jax/main.py',
    'generate': 'rlhf_jax/generate.py',
    'plan': 'planner/__main__.py',
  }
  if program in files:
    text = (ROOT / files[program]).read_text()
    known = {*re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text), 'config', 'print', 'help'}
    names = {argument.lstrip('-').partition('=')[0] for argument in arguments}
    assert not [name for name in names if name.partition('.')[0] not in known | {'verbosity'}]


class ConfigParser(flags.ArgumentParser):
  """Reads CONFIG[:ARG], as `rlhf run` does."""

  def parse(self, text):
    name, colon, arg = text.partition(':')
    return config_files.read(config_files.find(name), arg if colon else None)


def parse_config(options):
  """Reads --config with its overrides, in flags of their own."""
  kept = [option for option in options if not option.endswith('=None')]
  own, argv = flags.FlagValues(), ['program', *kept]
  config_flags.DEFINE_config_file('config', None, flag_values=own, sys_argv=argv)
  own['config'].parser = ConfigParser()
  own(argv)
  for option in set(options) - set(kept):  # a key that exists
    functools.reduce(lambda block, part: block[part], option[2:-5].split('.')[1:], own.config)


def test_wrong_commands_do_not_parse():
  """The check above sees what is wrong."""
  for command in (
    'rlhf run --config=quickstrat',
    'rlhf run --config=ppo --config.rl.kl_coeff=1',
    'rlhf run --config=ppo --config.optim.clip_nrom=None',
    'rlhf run --config=ppo:preset=x',
    'rlhf run --config=ppo --workdri=x',
    'rlhf rnu --config=ppo',
    'rlhf generate --modle=x',
    'rlhf evaluate --polices=a=b',
    'python -m benchmarks.nothing',
    'make nothing',
  ):
    with pytest.raises((SystemExit, Exception)):
      parse(shlex.split(command))


def newcomer():
  """The commands and the files of the section about one's own data."""
  page = ROOT / 'docs' / 'get_started.md'
  section = page.read_text().split('## PPO on your own prompts', 1)[1].split('Useful changes')[0]
  found = re.findall(r'^```(\S*)\n(.*?)^```$', section, re.M | re.S)
  shell = ''.join(text for language, text in found if language == 'sh')
  files = re.findall(r'`(\S+)`:\n\n```\w+\n(.*?)^```$', section, re.M | re.S)
  return shell.replace('\\\n', '').splitlines(), dict(files)


def test_from_clone_to_ppo_on_own_prompts_with_an_own_reward(tmp_path, monkeypatch):
  commands, files = newcomer()
  assert [shlex.split(command)[0] for command in commands] == ['git', 'pip', 'hf', 'rlhf']
  written = [line for text in files.values() for line in text.splitlines()]
  assert len(commands) <= 4 and len(written) <= 10 and set(files) == {'prompts.csv', 'reward.py'}
  monkeypatch.chdir(tmp_path)
  for name, text in files.items():
    pathlib.Path(name).write_text(text)
  pathlib.Path('rlhf_jax', 'rlhf_jax').mkdir(parents=True)  # the clone
  # In place of the download: a GPT-2 that is tiny. In place of the installation: this process.
  tokenizer = tokenizers.train_bpe(files['prompts.csv'].splitlines(), 280, 'tokenizer')
  fields = {'family': 'gpt2', 'n_embd': 8, 'n_layer': 1, 'n_head': 2, 'n_positions': 320}
  model = models.create(fields | {'vocab_size': len(tokenizer)})
  hf.save('gpt2', model, model.init(jax.random.key(0)), tokenizer=tokenizer)
  program, *arguments = shlex.split(commands[-1].replace('preset=trl', 'preset=trl,debug'))
  start = [sys.executable, '-c', 'from rlhf_jax import cli; cli.main()', *arguments]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
  assert program == 'rlhf' and done.returncode == 0, done.stderr
  folder = tmp_path / 'runs' / 'ppo-preset-trl-debug'
  metrics = (folder / 'metrics.jsonl').read_text().splitlines()
  assert len(metrics) >= 2 and '"objective/scores"' in metrics[-1]
  assert (folder / 'model' / 'model.safetensors').exists() and (folder / 'report.html').exists()
