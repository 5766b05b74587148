"""Live policies: streamed answers, newer checkpoints, limits, and a process that dies."""

import asyncio
import concurrent.futures
import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import psutil
import pytest

from rlhf_jax import checkpoint
from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import types
from rlhf_jax.feedback import live
from rlhf_jax.feedback import live_messages
from rlhf_jax.feedback import live_worker
from rlhf_jax.rollout import streaming
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 300  # a busy machine loads and compiles slowly


async def read(answer):
  """Returns an answer and its pieces."""
  return answer, [piece async for piece in answer]


def test_answers_of_two_policies_side_by_side(live_policies, policy_folders):
  """Five answers of two policies with two rows each: those of `TextPolicy.sample`, in pieces.

  Meanwhile the event loop runs another task: reading never blocks it.
  """
  messages = [{'role': 'user', 'content': 'w1'}, {'role': 'assistant', 'content': 'w2'}]
  asked = [
    ('calm', 'w1 w2', {'temperature': 0.0}),
    ('wild', 'w1 w2', {'temperature': 0.0}),
    ('calm', 'w5 w6', {'temperature': 0.7, 'seed': 4}),
    ('calm', messages, {'temperature': 0.7, 'seed': 9}),
    ('calm', 'w5 w6', {'temperature': 0.7, 'seed': 5}),
  ]
  ticks = 0

  async def main():
    async def tick():
      nonlocal ticks
      while True:
        ticks += 1
        await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    streams = [
      read(live_policies.stream(name, prompt, max_new_tokens=40, **settings))
      for name, prompt, settings in asked
    ]
    try:
      return await asyncio.gather(*streams)
    finally:
      ticking.cancel()

  results = asyncio.run(main())
  assert live_policies.names == ['calm', 'wild'] and ticks > 5
  policies = dict(zip(live_policies.names, map(policy_lib.TextPolicy.load, policy_folders)))
  for (answer, pieces), (name, prompt, settings) in zip(results, asked, strict=True):
    text = prompt if isinstance(prompt, str) else 'w1\nw2'
    full = {'seed': 0} | settings
    alone = policies[name].sample(
      [text], full['seed'], max_new_tokens=40, temperature=full['temperature']
    )
    assert answer.text == ''.join(pieces) == alone.responses[0]
    ended = alone.response_tokens[0][-1] == tiny.EOS
    assert answer.finish == ('end' if ended else 'length') and answer.policy == name
    assert answer.checkpoint == str(policy_folders[name == 'wild'].resolve())
    expected = {'top_k': 0, 'top_p': 1.0, 'max_new_tokens': 40} | full
    assert answer.sampling | {'seed': full['seed']} == expected
  assert max(len(pieces) for _, pieces in results) > 5


def test_requests_that_cannot_be_answered(live_policies):
  async def ask(*request, **settings):
    return await read(live_policies.stream(*request, **settings))

  with pytest.raises(live.Refused, match='has 97 tokens; .* context of 96'):
    asyncio.run(ask('calm', tiny.text(0, 96)))
  with pytest.raises(live.Refused, match=r'temperature=-1\.0'):
    asyncio.run(ask('calm', 'w1', temperature=-1.0))
  with pytest.raises(errors.UserError, match="no policy 'nobody': the policies are calm, wild"):
    asyncio.run(ask('nobody', 'w1'))


def test_a_reader_that_goes_away_frees_its_place(live_policies):
  async def main():
    async with contextlib.aclosing(live_policies.stream('calm', 'w1', temperature=0.0)) as answer:
      await anext(answer)
    task = asyncio.create_task(read(live_policies.stream('calm', 'w1')))
    await asyncio.sleep(0)
    assert len(live_policies._answers) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert not live_policies._answers
    return await read(live_policies.stream('calm', 'w1', max_new_tokens=3, temperature=0.0))

  assert asyncio.run(main())[0].finish == 'length'


def test_a_reader_that_goes_away_together_with_a_piece_frees_its_place(live_policies):
  async def main():
    answer = live_policies.stream('calm', 'w1', temperature=0.0)
    task = asyncio.create_task(read(answer))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answer._inbox.put_nowait(live_messages.Piece(answer._ask.id, 'text', None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert not live_policies._answers

  asyncio.run(main())


def test_limits_of_time_and_number(policy_folders, monkeypatch):
  """The process cannot answer within its first 50 ms, in which it imports JAX."""
  policies = live.Policies({'mild': policy_folders[0]}, max_waiting=1, seconds=0.05)
  process = psutil.Process(policies.process_id)

  async def main():
    first = asyncio.create_task(read(policies.stream('mild', 'w1')))
    await asyncio.sleep(0)
    with pytest.raises(live.Unavailable, match='busy with 1 answers'):
      await anext(policies.stream('mild', 'w1'))
    with pytest.raises(live.Unavailable, match=r'within 0\.05 seconds'):
      await first
    waiting = policies.stream('mild', 'w1')
    waiting._seconds = SECONDS
    task = asyncio.create_task(read(waiting))
    await asyncio.sleep(0)

    def fail(*_, **__):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
      patch.setattr(subprocess, 'Popen', fail)
      policies._worker.answered = True  # so that another process is started at once
      process.kill()  # instead of the end of the imports
      with pytest.raises(live.Unavailable, match=r'killed by signal 9 \(SIGKILL\): ask again'):
        await task
      with pytest.raises(live.Unavailable, match=r'cannot be started \(Too many open files\)'):
        await read(policies.stream('mild', 'w1'))

  asyncio.run(main())
  policies.close()
  assert not process.is_running()
  with pytest.raises(live.Unavailable, match='closed'):
    asyncio.run(read(policies.stream('mild', 'w1')))


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(live_policies):
  async def main():
    before = await read(live_policies.stream('wild', 'w3', max_new_tokens=30, seed=2))
    first = live_policies.process_id
    answer = live_policies.stream('calm', 'w1', temperature=0.0, max_new_tokens=90)
    await anext(answer)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(live.Unavailable, match='SIGKILL'):
      await read(answer)
    after = await read(live_policies.stream('wild', 'w3', max_new_tokens=30, seed=2))
    return first, before[0].text, after[0].text

  first, before, after = asyncio.run(main())
  assert before == after != '' and live_policies.process_id != first
  assert not psutil.pid_exists(first)


@pytest.mark.slow
def test_the_process_ends_with_the_page(policy_folders):
  """Even if the page is killed."""
  code = (
    'import sys, time; from rlhf_jax.feedback import live; '
    'print(live.Policies(sys.argv[1:]).process_id, flush=True); time.sleep(600)'
  )
  page = subprocess.Popen(
    [sys.executable, '-c', code, *policy_folders], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  process = psutil.Process(int(page.stdout.readline()))
  page.kill()
  page.wait()
  process.wait(SECONDS)  # raises TimeoutExpired
  page.stdout.close()


def write_run(folder, model_folder):
  """Writes a run that is still training, without checkpoints; returns its model and parameters."""
  policy = policy_lib.TextPolicy.load(model_folder)
  policy.tokenizer.save_pretrained(folder / 'tokenizer')
  fields = json.loads((model_folder / 'config.json').read_text())
  (folder / 'model.json').write_text(json.dumps(fields | {'name': 'policy'}))
  trained = {'lora': {'targets': None, 'path': None}, 'unfrozen_layers': None}
  (folder / 'config.json').write_text(json.dumps({'algorithm': 'ppo', 'model': trained}))
  return policy


def save(folder, step, params):
  """Writes a checkpoint of a run."""
  state = types.TrainState(jnp.int32(step), jax.random.key(0), {'policy': params}, {}, {})
  with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(step, state, {})


def test_open_answers_finish_with_the_old_checkpoint(tmp_path, policy_folders):
  """A newer checkpoint is loaded beside the old one, and answers what is asked from then on."""
  policy = write_run(tmp_path, policy_folders[0])
  other = policy_lib.TextPolicy.load(policy_folders[1])
  save(tmp_path, 3, policy.params)
  setup = live_messages.Setup({'run': str(tmp_path)}, 2, 88, None)  # compiled by no other test
  with concurrent.futures.ThreadPoolExecutor(1) as executor:

    def settle():
      concurrent.futures.wait([executor.submit(lambda: None)])  # what was loaded before is done
      return served.settle()

    served = live_worker.Served(str(tmp_path), setup, executor, lambda: None)
    old = settle()
    assert served.checkpoint == f'{tmp_path}/checkpoints/3'
    request = old.submit('w1', max_new_tokens=60, temperature=0.0)
    compiled = streaming.join._cache_size(), streaming.decode._cache_size()
    served.step()  # has been compiled when it was loaded
    assert compiled == (streaming.join._cache_size(), streaming.decode._cache_size())
    served.look()
    assert settle() is old  # there is no newer one
    save(tmp_path, 7, other.params)
    served.look()
    new = settle()
    assert served.checkpoint == f'{tmp_path}/checkpoints/7' and new is not old
    later = new.submit('w1', max_new_tokens=60, temperature=0.0)
    assert request.finish is None
    while served.busy:
      served.step()
  for found, loaded in ((request, policy), (later, other)):
    expected = loaded.sample(['w1'], max_new_tokens=60, temperature=0.0).responses[0]
    assert found.text.text == expected


def test_a_damaged_checkpoint_leaves_the_old_one(tmp_path, policy_folders):
  policy = write_run(tmp_path, policy_folders[0])
  (tmp_path / 'checkpoints').mkdir()
  setup = live_messages.Setup({'run': str(tmp_path)}, 2, 96, None)
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    served = live_worker.Served(str(tmp_path), setup, executor, lambda: None)
    concurrent.futures.wait([executor.submit(lambda: None)])
    for _ in range(2):  # it is not tried again while nothing has changed
      assert 'there is no checkpoint' in str(served.settle())
      served.look()
      assert served._loading is None
    save(tmp_path, 2, policy.params)
    served.look()
    concurrent.futures.wait([executor.submit(lambda: None)])
    streams = served.settle()
    (tmp_path / 'model').mkdir()  # the run has finished, but its model is gone
    served.look()
    concurrent.futures.wait([executor.submit(lambda: None)])
    assert served.settle() is streams and served.checkpoint.endswith('checkpoints/2')


def test_a_folder_that_cannot_be_read_does_not_end_the_process(tmp_path, monkeypatch):
  def fail(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(pathlib.Path, 'is_dir', fail)
  assert live_worker.version(tmp_path) == ('unreadable', '[Errno 13] Permission denied')


def test_the_process_says_that_it_is_alive(monkeypatch):
  """Also while nobody asks, so that it is not killed for the first answer that takes long."""
  monkeypatch.setattr(live_worker, 'LOOK_SECONDS', 0.05)
  ours, theirs = multiprocessing.Pipe()
  server = live_worker.Server(live_messages.Setup({}, 1, 96, None), theirs)
  thread = threading.Thread(target=server.run)
  thread.start()
  for _ in range(3):
    assert ours.poll(60) and ours.recv() == live_messages.Alive()
  ours.close()
  thread.join(60)
  assert not thread.is_alive()


def test_names_tell_folders_apart():
  paths = [pathlib.Path(path) for path in ('/a/x/ppo', '/a/y/ppo', '/a/y/sft')]
  assert live.names(paths[1:]) == ['ppo', 'sft']
  assert live.names(paths) == ['x/ppo', 'y/ppo', 'y/sft']
  with pytest.raises(errors.UserError, match='no such folder'):
    live.Policies(['/nowhere'])
  with pytest.raises(errors.UserError, match='no policies'):
    live.Policies([])
