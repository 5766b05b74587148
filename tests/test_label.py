"""The command `rlhf label`: its data, links, and the page that it serves; samples without a run."""

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
import types
import urllib.error
import urllib.request

import pytest

from rlhf_jax import label
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.tasks import review_samples
from rlhf_jax.tasks import reviews


def run(monkeypatch, capsys, *arguments):
  """Runs `rlhf label` in this process; returns what it prints."""
  monkeypatch.setattr(sys, 'argv', ['rlhf label', *arguments])
  label.start()
  return capsys.readouterr().out


def test_an_annotator_gets_a_link_and_later_a_new_one(tmp_path, monkeypatch, capsys):
  db = tmp_path / 'feedback.db'
  flags = f'--db={db}', '--project=films', '--port=8123', '--add_annotator=Ada'
  found = []
  for _ in range(2):
    match = re.fullmatch(
      r'http://127\.0\.0\.1:8123/sign-in/([\w-]{43})\n', run(monkeypatch, capsys, *flags)
    )
    found.append(match[1])
  with store_lib.Store.open(db) as store:
    assert store.annotator(token=found[0]) is None
    assert store.annotator(token=found[1]).name == 'Ada'
    accounts.change(store.database, store.annotator('Ada'), disabled=True)
  with pytest.raises(SystemExit):
    monkeypatch.setattr('rlhf_jax.runtime.exit_now', lambda message, status: sys.exit(message))
    run(monkeypatch, capsys, *flags)


def test_a_start_without_an_owner_makes_one_under_a_free_name(tmp_path, capsys):
  options = argparse.Namespace(host='127.0.0.1', port=8123, allowed_hosts='', project="Ada's films")
  options.db = str(tmp_path / 'x.db')
  with store_lib.Store.open(options.db) as store:
    store.add_annotator('owner')  # before the first start, or with imported data
    for name in ('owner 2', 'owner 3'):
      label.welcome(store, options)
      link = re.search(rf'as {name}, shown once: .*/sign-in/(\S+)', capsys.readouterr().out)[1]
      assert store.annotator(token=link).role == 'owner'
      label.welcome(store, options)
      hint = capsys.readouterr().out.splitlines()[1]
      flags = shlex.split(hint.partition('rlhf label ')[2])
      assert flags == [
        f'--db={store.database.url}',  # without its password
        "--project=Ada's films",
        '--port=8123',
        f'--add_annotator={name}',
      ]
      accounts.change(store.database, store.annotator(name), disabled=True)


def test_owners_and_settings_of_a_project(tmp_path, monkeypatch, capsys):
  db = f'--db={tmp_path}/x.db'
  add = db, '--project=films', '--add_annotator=Ada'
  run(monkeypatch, capsys, *add, '--role=owner', '--overlap=2', '--selection=elo')
  run(monkeypatch, capsys, *add)
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    assert store.annotator('Ada').role == 'owner'
    project = store.project('films')
    assert (project.overlap, project.selection) == (2, 'elo')
  monkeypatch.setattr('rlhf_jax.runtime.exit_now', lambda message, status: sys.exit(message))
  for flag, message in (
    ('--overlap=3', 'was made with overlap=2'),
    ('--role=annotator', "has the role 'owner'"),
  ):
    with pytest.raises(SystemExit, match=message):
      run(monkeypatch, capsys, *add, flag)


def test_data_is_a_list_of_files_or_a_folder(tmp_path):
  for name in ('ppo', 'sft'):
    (tmp_path / f'{name}.jsonl').touch()
  files = {name: str(tmp_path / f'{name}.jsonl') for name in ('ppo', 'sft')}
  assert label.sample_files(str(tmp_path)) == files
  assert label.sample_files('a=x.jsonl,b=y=z.jsonl') == {'a': 'x.jsonl', 'b': 'y=z.jsonl'}
  for wrong in ('x.jsonl', 'a=', '=x', 'a=x,'):
    with pytest.raises(UserError, match='must be POLICY=FILE'):
      label.sample_files(wrong)


def test_policies_have_names_or_not():
  assert label.policy_folders('a=runs/x,b=runs/lr=3') == {'a': 'runs/x', 'b': 'runs/lr=3'}
  assert label.policy_folders('runs/x,runs/lr=3,') == ['runs/x', 'runs/lr=3']
  for wrong, message in (('a=x,y', 'must be NAME=DIR'), ('a=', 'must be'), ('a=x,a=y', 'twice')):
    with pytest.raises(UserError, match=message):
      label.policy_folders(wrong)


def test_a_name_with_another_folder_is_a_warning(tmp_path, capsys):
  """Checkpoints and the model of a run are one policy; so is a policy of another project."""
  (tmp_path / 'link').symlink_to(tmp_path / 'run')
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    project, other = store.add_project('p'), store.add_project('q')
    for where, policy, checkpoint in (
      (project, 'sft', '/runs/sft/checkpoints/10'),
      (project, 'sft', '/runs/sft/checkpoints/20'),
      (project, 'sft', '/runs/sft/model'),
      (project, 'hf', '/models/tiny'),
      (project, 'file', None),
      (project, 'own', 'step 100'),
      (project, 'link', str(tmp_path / 'link')),
      (other, 'ppo', '/runs/old'),
    ):
      prompt = store.add_prompt(where, 'q')
      store.add_completion(prompt, 'a', policy=policy, checkpoint=checkpoint)
    same = {'sft': '/runs/sft', 'hf': '/models/tiny', 'file': '/x', 'ppo': '/runs/new'}
    same |= {'own': '/runs/own', 'link': str(tmp_path / 'run')}
    label.warn_of_other_folders(store, project, same)
    label.warn_of_other_folders(store, project, {'sft': '/runs/sft/model'})
    assert capsys.readouterr().err == ''
    label.warn_of_other_folders(store, project, same | {'sft': '/runs/sft_2'})
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
      "Warning: the policy 'sft' has answers from /runs/sft, and new ones would come from "
      '/runs/sft_2. '
    )


def test_the_command_warns_before_it_serves(tmp_path, monkeypatch, capsys):
  folder = tmp_path / 'new'
  folder.mkdir()
  with store_lib.Store.open(tmp_path / 'x.db') as store:
    prompt = store.add_prompt(store.add_project('p'), 'q')
    store.add_completion(prompt, 'a', policy='sft', checkpoint='/runs/old/checkpoints/10')
  serves = types.SimpleNamespace(run=lambda sockets: print('serves', file=sys.stderr))
  monkeypatch.setattr('uvicorn.Server', lambda config: serves)
  # uvicorn's configuration of logs would close those of this process.
  monkeypatch.setattr('rlhf_jax.feedback.page.serve.config', lambda *_, **__: None)
  monkeypatch.setattr('rlhf_jax.feedback.live.Policies._start', lambda self: None)
  arguments = f'--db={tmp_path}/x.db', '--project=p', '--port=0', f'--policies=sft={folder}'
  monkeypatch.setattr(sys, 'argv', ['rlhf label', *arguments])
  label.start()
  warning, last = capsys.readouterr().err.splitlines()
  assert '/runs/old, ' in warning and f'from {folder}. ' in warning and last == 'serves'


def test_a_port_in_use_is_named():
  with label.listen('127.0.0.1', 0) as listener:
    port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f'--port={port}: .*in use'):
      label.listen('127.0.0.1', port)


def test_samples_without_a_run_answer_the_same_prompts(tmp_path):
  paths = review_samples.write(tmp_path, quickstart=tmp_path / 'none', count=20, seed=0)
  assert [path.stem for path in paths] == ['clumsy', 'fluent', 'favourable']
  records = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
  prompts = [[record['prompt'] for record in found] for found in records]
  assert prompts[0] == prompts[1] == prompts[2] and len(set(prompts[0])) == 20
  gold = [
    sum(reviews.gold_score(record['prompt'], record['completion']) for record in found) / 20
    for found in records
  ]
  assert gold[0] < gold[1] < gold[2]


def test_samples_of_a_run_come_from_its_report(tmp_path):
  sample = {'prompt': 'p', 'before': 'x', 'after': 'y', 'scores': {}}
  (tmp_path / 'report.json').write_text(json.dumps({'samples': [sample]}))
  review_samples.write(tmp_path / 'out', quickstart=tmp_path, count=20, seed=0)
  assert json.loads((tmp_path / 'out' / 'sft.jsonl').read_text())['completion'] == 'x'
  assert json.loads((tmp_path / 'out' / 'ppo.jsonl').read_text())['completion'] == 'y'


def test_the_command_serves_the_page(tmp_path):
  review_samples.write(tmp_path / 'samples', quickstart=tmp_path, count=4, seed=0)
  command = [sys.executable, '-m', 'rlhf_jax.label', f'--db={tmp_path}/x.db', '--project=reviews']
  command += [f'--data={tmp_path}/samples', '--port=0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as page:
    try:
      assert re.fullmatch(r'Added \d+ tasks\.\n', page.stdout.readline())
      url = re.match(r'Labelling page: (http://127\.0\.0\.1:\d+) ', page.stdout.readline())[1]
      link = re.search(rf'{url}/sign-in/[\w-]{{43}}', page.stdout.readline())[0]
      with urllib.request.urlopen(link, timeout=60) as response:
        assert b'Continue as <bdi>owner</bdi>' in response.read()
      with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(link[:-1], timeout=60)
    finally:
      page.terminate()
      out, err = page.communicate(timeout=60)
  assert page.returncode == 143
  assert link.rpartition('/')[2] not in out + err and 'Traceback' not in err
  with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
    probe.connect(('127.0.0.1', int(url.rpartition(':')[2])))
