"""Progress bars: updated in place on a terminal, lines in a log file."""

import io
import sys

import tqdm

from rlhf_jax import loop
from rlhf_jax import progress
import tiny


class Stream(io.StringIO):
  """A terminal or a log file."""

  def __init__(self, terminal):
    super().__init__()
    self._terminal = terminal

  def isatty(self):
    return self._terminal


def stderr(monkeypatch, *, terminal):
  """Replaces stderr by a stream; called in a test's body, because pytest sets stderr before it."""
  stream = Stream(terminal)
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(progress, 'LOG_SECONDS', 0.0)
  return stream


def test_a_log_file_gets_lines_now_and_then(monkeypatch):
  stream = stderr(monkeypatch, terminal=False)
  for step in tqdm.tqdm(range(3), desc='ppo', postfix='compiling', **progress.display()):
    assert len(stream.getvalue().splitlines()) == step + 1
  text = stream.getvalue()
  assert '\r' not in text and '█' not in text and text.endswith('\n')
  assert text.startswith('ppo: 0/3 [00:00<?, ?it/s, compiling]\nppo: 1/3 [00:00<00:0')
  for _ in tqdm.tqdm(range(3), desc='reading', leave=False, **progress.display()):
    pass
  assert '\n\n' not in stream.getvalue()  # a bar that is removed leaves no empty line


def test_a_terminal_has_one_bar(monkeypatch):
  stream = stderr(monkeypatch, terminal=True)
  for _ in tqdm.tqdm(range(3), desc='ppo', **progress.display()):
    pass
  assert '\rppo: 100%|' in stream.getvalue() and stream.getvalue().count('\n') == 1


def test_a_run_shows_that_it_compiles_until_its_first_step_is_done(world, tmp_path, monkeypatch):
  stream = stderr(monkeypatch, terminal=False)
  config = tiny.sft(world)
  config.steps = 2
  loop.run(config, tmp_path / 'sft')
  lines = [line for line in stream.getvalue().splitlines() if line.startswith('sft: ')]
  assert [line.split()[1] for line in lines[:3]] == ['0/2', '1/2', '2/2']
  assert 'compiling' in lines[0] and ', loss=' in lines[1]
  assert not any('compiling' in line for line in lines[1:])
