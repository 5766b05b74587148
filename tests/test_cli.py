"""The command `rlhf` and its subcommands: their output, files and errors."""

import importlib
import json
import sys

from absl import flags
import jax
import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import generate
from rlhf_jax import main
from rlhf_jax import metrics
from rlhf_jax import models
from rlhf_jax import report
from rlhf_jax import runtime
from rlhf_jax.algorithms import sft
from rlhf_jax.models import hf
import tiny


def call(monkeypatch, *arguments):
  """Runs `rlhf` with arguments in this process."""
  monkeypatch.setattr(sys, 'argv', ['rlhf', *arguments])
  monkeypatch.setattr(runtime, 'configure', lambda: None)
  monkeypatch.setattr(runtime, 'exit_now', lambda message, status: sys.exit(message))
  cli.main()


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h'], ['help']])
def test_help_lists_the_commands(arguments, monkeypatch, capsys):
  call(monkeypatch, *arguments)
  out = capsys.readouterr().out
  assert out.startswith('rlhf COMMAND') and out.count('--config=quickstart') == 1
  for name in ('run', 'generate', 'merge', 'evaluate', 'report', 'plan'):
    assert f'\n  {name} ' in out


@pytest.mark.parametrize(
  'name, hint',
  [('rnu', "Did you mean 'run'? "), ('evalute', "Did you mean 'evaluate'? "), ('x', '')],
)
def test_a_misspelt_command_gets_one_line(name, hint, monkeypatch):
  with pytest.raises(SystemExit) as caught:
    call(monkeypatch, name)
  assert caught.value.code == (
    f'error: rlhf has no command {name!r}. {hint}The commands are run, generate, merge, evaluate, '
    'report, sweep, compare, label, elo, plan.'
  )


def test_every_command_can_be_started():
  for module, _ in cli.COMMANDS.values():
    if module != 'planner.__main__':  # which has the flags of main
      assert callable(importlib.import_module(module).start)


@pytest.mark.parametrize('command', ['evaluate', 'report'])
def test_help_and_mistakes_of_a_command_without_a_config(command, monkeypatch, capsys):
  with pytest.raises(SystemExit) as caught:
    call(monkeypatch, command, '--help')
  assert caught.value.code == 0
  out = capsys.readouterr().out
  assert out.startswith(f'rlhf {command} --') and '--workdir WORKDIR' in out
  with pytest.raises(SystemExit) as caught:
    call(monkeypatch, command, '--workdir=x', '--no_such=1')
  assert caught.value.code == (
    'error: unrecognized arguments: --no_such=1. `rlhf ' + command + ' --help` lists the options.'
  )


@pytest.mark.parametrize(
  'config, folder',
  [
    ('quickstart', 'runs/quickstart'),
    ('quickstart:debug,seed=3', 'runs/quickstart-debug-seed-3'),
    ('configs/stories.py:model=/models/x', 'runs/stories-model-models-x'),
  ],
)
def test_without_a_workdir_a_run_goes_to_a_folder_of_the_configs_name(
  config, folder, monkeypatch, capsys
):
  monkeypatch.setattr(flags.FLAGS['config'].parser, 'text', config)
  flags.FLAGS.mark_as_parsed()
  assert main.folders() == (folder, None)
  assert capsys.readouterr().out == f'--workdir={folder}\n'


def test_a_config_json_needs_a_workdir(monkeypatch):
  monkeypatch.setattr(flags.FLAGS['config'].parser, 'text', 'runs/x/config.json')
  flags.FLAGS.mark_as_parsed()
  with pytest.raises(errors.UserError, match='--workdir is missing: name a new folder'):
    main.folders()
  assert command_line.default_workdir() == ''


def test_prompts_have_line_breaks_and_may_be_files(tmp_path):
  (tmp_path / 'prompt.txt').write_text('two\nlines \\n\n')
  assert generate.prompt_of(r'a\nb\tc\\nabla') == 'a\nb\tc\\nabla'
  assert generate.prompt_of(f'@{tmp_path}/prompt.txt') == 'two\nlines \\n'
  with pytest.raises(
    errors.UserError, match='--prompt=@nobody: nobody cannot be read .*into a file'
  ):
    generate.prompt_of('@nobody')


def test_experts_have_no_q_functions(monkeypatch):
  flags.FLAGS.mark_as_parsed()
  monkeypatch.setattr(flags.FLAGS['expert'], 'value', ['a:b'])
  monkeypatch.setattr(flags.FLAGS['beta'], 'value', 1.0)
  with pytest.raises(SystemExit, match='--beta needs the Q functions of one run, and --expert'):
    generate.main(['generate'])


@pytest.fixture(scope='module')
def policies(world, tmp_path_factory):
  """Returns two folders of language models, as the value of --policies."""
  other = tmp_path_factory.mktemp('policies') / 'other'
  model = models.create(tiny.LLAMA)
  hf.save(other, model, model.init(jax.random.key(9)), tokenizer=tiny.write_tokenizer(other))
  return f'a={world}/model,b={other}'


def many_words(prompts, responses, *, metadata):
  """A judge: the number of words; the prompt's column `number` must be present."""
  assert all('number' in entry for entry in metadata)
  return [float(len(response.split())) for response in responses]


def test_policies_are_compared_without_training(policies, world, tmp_path, monkeypatch, capsys):
  call(
    monkeypatch,
    'evaluate',
    f'--policies={policies}',
    f'--prompts={world}/prompts.jsonl',
    f'--judge={__name__}:many_words',
    f'--reward_model={world}/reward',
    '--max_new_tokens=5',
    f'--workdir={tmp_path}/out',
  )
  out = capsys.readouterr().out
  assert 'Win rate' in out and 'Elo' in out and out.count('\nprompt: ') == 3
  assert f'report: {tmp_path}/out/report.html' in out
  results = json.loads((tmp_path / 'out' / 'results.json').read_text())
  samples = [
    json.loads(line) for line in (tmp_path / 'out' / 'samples.jsonl').read_text().splitlines()
  ]
  # Recompute from the samples: mean scores, and wins with draws as halves.
  words = np.array([[len(s['responses'][n]['response'].split()) for n in 'ab'] for s in samples])
  proxy = np.array([[s['responses'][n]['proxy'] for n in 'ab'] for s in samples])
  assert len(samples) == 40 and [row['stage'] for row in results['stages']] == ['a', 'b']
  for i, row in enumerate(results['stages']):
    assert row['gold'] == pytest.approx(words[:, i].mean())
    assert row['proxy'] == pytest.approx(proxy[:, i].mean(), abs=1e-5)
  difference = words[:, 1] - words[:, 0]
  rate = np.mean((difference > 0) + 0.5 * (difference == 0))
  assert results['stages'][1]['win_rate'] == pytest.approx(rate)
  page = (tmp_path / 'out' / 'report.html').read_text()
  (tmp_path / 'out' / 'report.html').unlink()
  call(monkeypatch, 'report', f'--workdir={tmp_path}/out')
  assert (tmp_path / 'out' / 'report.html').read_text() == page and samples[0]['prompt'] in page


def test_policies_are_compared_by_exact_match(policies, world, tmp_path, monkeypatch, capsys):
  path = tmp_path / 'prompts.jsonl'
  tiny.write_jsonl(path, [{'prompt': f'w{i}', 'answer': 'w1'} for i in range(4)])
  arguments = [f'--policies={policies}', f'--prompts={path}', '--max_new_tokens=1']
  monkeypatch.chdir(tmp_path)
  call(monkeypatch, 'evaluate', *arguments, '--judge=exact_match:answer', '--samples=8')
  assert 'report: runs/compare-a-b/report.html' in capsys.readouterr().out
  with pytest.raises(SystemExit, match="record 1 of the prompts has no column 'anser'"):
    call(monkeypatch, 'evaluate', *arguments, '--judge=exact_match:anser')


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'set --policies to compare policies, or --workdir'),
    (['--policies=a'], "--policies='a' must be NAME=FOLDER,NAME=FOLDER"),
    (['--policies=a=x,a=y'], 'with different names'),
    (['--policies=a=x'], '--prompts is missing'),
    (['--policies=a=x', '--prompts=p'], '--judge is missing'),
    (
      ['--policies=a=x', '--prompts=p', '--judge=m:f', '--baseline=c'],
      "baseline='c' is not the name of a policy",
    ),
    (
      ['--policies=a=x', '--prompts=p', '--judge=no_module:f'],
      "judge='no_module:f' cannot be loaded",
    ),
    (['--policies=a=x', '--prompts=p', '--judge=m:f', '--best_of=2'], 'needs a reward model'),
    (['--policies=a=x', '--prompts=p', '--judge=m:f', '--workdir=run'], 'holds a run'),
  ],
)
def test_mistakes_of_a_comparison(arguments, message, tmp_path, monkeypatch):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match=message):
    call(monkeypatch, 'evaluate', *arguments)


def test_the_report_of_a_run_and_of_an_unfinished_pipeline(tmp_path):
  with pytest.raises(errors.UserError, match='is not the folder of a run'):
    report.write(tmp_path)
  config = sft.config().to_dict()
  for folder, fields in (
    (tmp_path / 'one', config),
    (tmp_path / 'many', {'stages': ['first'], 'seed': 0, 'first': config}),
  ):
    with metrics.Writer(folder if folder.name == 'one' else folder / 'first') as writer:
      for step in range(3):
        writer.write(step, {'loss': 3.0 - step})
    (folder / 'config.json').write_text(json.dumps(fields))
    assert report.write(folder) == folder / 'report.html'
    assert '<svg' in (folder / 'report.html').read_text()
