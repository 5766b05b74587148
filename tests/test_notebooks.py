"""The notebooks, run from top to bottom: at debug size, and at full size if requested."""

import ast
import base64
import html.parser
import os
import pathlib
import re

import pytest
import quick

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
pandas = pytest.importorskip('pandas')
pytest.importorskip('ipykernel')
pytest.importorskip('matplotlib')

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
PNG = b'\x89PNG\r\n'


class Cells(html.parser.HTMLParser):
  """The rows of an HTML table, lists of texts."""

  def __init__(self, text):
    super().__init__()
    self.rows, self._inside = [], False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag == 'tr':
      self.rows.append([])
    elif tag in ('td', 'th'):
      self._inside = True
      self.rows[-1].append('')

  def handle_endtag(self, tag):
    if tag in ('td', 'th'):
      self._inside = False

  def handle_data(self, data):
    if self._inside:
      self.rows[-1][-1] += data


def number(text):
  """A cell as a float, if it is a number."""
  try:
    return float(text)
  except ValueError:
    return text


class Outputs:
  """The printed and displayed output of a notebook."""

  def __init__(self, notebook):
    self.cells = [cell for cell in notebook.cells if cell.cell_type == 'code']

  def of(self, text):
    """Returns the outputs of the one code cell that contains `text`."""
    [cell] = [cell for cell in self.cells if text in cell.source]
    return cell.outputs

  def text(self, text):
    """Returns the text that a cell printed or returned."""
    return ''.join(
      output.get('text', '') + output.get('data', {}).get('text/plain', '')
      for output in self.of(text)
      if output.get('name') != 'stderr'
    )

  def html(self, text):
    """Returns the HTML that a cell returned."""
    return ''.join(output.get('data', {}).get('text/html', '') for output in self.of(text))

  def pictures(self, text):
    """Returns the pictures that a cell drew, as PNG."""
    images = [output.get('data', {}).get('image/png') for output in self.of(text)]
    return [base64.b64decode(image) for image in images if image]

  def table(self, text):
    """Returns the table that a cell returned, a DataFrame indexed by the first column."""
    (_, *columns), *rows = Cells(self.html(text)).rows
    cells = [[number(cell) for cell in row[1:]] for row in rows]
    return pandas.DataFrame(cells, [row[0] for row in rows], columns)


def execute(name, folder, *, debug):
  """Executes a notebook with `folder` as its working directory; returns its Outputs."""
  environment = {
    'RLHF_DEBUG': '1' if debug else '',
    'JUPYTER_PREFER_ENV_PATH': '1',  # this interpreter, not a registered kernel
    'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    'XLA_FLAGS': quick.FLAGS if debug else '',  # without the eight devices of conftest.py
    'IPYTHONDIR': str(folder / 'ipython'),
  }
  notebook = nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=600 if debug else 3_000,
    kernel_name='python3',
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute(env=os.environ | environment)
  return Outputs(notebook)


def test_the_four_notebooks_are_there():
  names = {path.stem for path in NOTEBOOKS}
  assert names == {'quickstart', 'ppo_step_by_step', 'reward_hacking', 'your_own_data'}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_results(path):
  """For the docs: no local path, no errors or warnings, and a limited size."""
  text = path.read_text(encoding='utf-8')
  assert len(text) < 400_000 and not re.search(r'/(tmp|home|root|work)/', text)
  notebook = nbformat.reads(text, as_version=4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert all(output.output_type != 'error' and output.get('name') != 'stderr' for output in outputs)
  assert sum('image/png' in output.get('data', {}) for output in outputs) >= 4


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_refuses_to_install_from_nowhere(path, tmp_path, monkeypatch):
  """The first cell does nothing if rlhf_jax is installed, else gives a message before pip."""
  notebook = nbformat.read(path, as_version=4)
  source = next(cell.source for cell in notebook.cells if cell.cell_type == 'code')
  source = source.replace('%pip install --quiet {REPOSITORY}', 'installed.append(REPOSITORY)')
  names = {'installed': []}
  exec(source, names)
  assert names['installed'] == []
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  (tmp_path / 'below').mkdir()
  monkeypatch.chdir(tmp_path / 'below')
  with pytest.raises(AssertionError, match="REPOSITORY='..' is not a clone of rlhf_jax"):
    exec(source, names)
  (tmp_path / 'setup.py').touch()
  exec(source, names)
  assert names['installed'] == ['..']


def check_quickstart(outputs):
  """All stages, a comparison of three policies, figures, samples and the report."""
  for stage in ('pretrain', 'sft', 'reward_model', 'ppo'):
    assert f'/{stage}/model: ' in outputs.text(f"workdir=WORK / '{stage}'")
  comparison = outputs.table('rl.compare(')
  assert list(comparison.index) == ['sft', 'pretrained', 'ppo']
  assert 'pretrained' in outputs.text('rl.compare(')
  [picture] = outputs.pictures('ppo.plot(')
  assert picture.startswith(PNG)
  responses = outputs.table('comparison.responses[columns]')
  assert len(responses) == 6 and {'sft score', 'ppo score'} < set(responses)
  assert responses['sft score'].between(-3, 3).all()
  report = outputs.html('ppo.report()')
  assert "srcdoc='<!" in report and '<svg' in report and 'objective/scores' in report
  return outputs.table('both.round')


def check_ppo_step_by_step(outputs):
  """The numbers by hand equal those of the train step; the ratio of the first step is 1."""
  table = outputs.table('hand = {')
  assert len(table) == 12
  assert (table['by hand'] - table['train_step']).abs().max() < 1e-3
  assert 'all metrics agree' in outputs.text('all metrics agree')
  steps = outputs.table('by_hand.append(metrics)')
  assert steps['policy/ratio'].iloc[0] == 1.0 and steps['policy/clipfrac'].iloc[0] == 0.0
  assert steps['policy/approxkl'].iloc[0] == 0.0 < steps['policy/approxkl'].iloc[3]
  drawn = [picture for cell in outputs.cells for picture in outputs.pictures(cell.source)]
  assert len(drawn) >= 9 and all(picture.startswith(PNG) for picture in drawn)


def check_reward_hacking(outputs):
  """Both runs report gold and proxy scores, and the overrated responses are sorted."""
  summary = outputs.table('def summary(')
  assert list(summary.index) == ['kl_coef 0.01', 'kl_coef 0.3']
  gap = summary['proxy'] - summary['gold'] - summary['proxy - gold']
  assert gap.abs().max() < 0.02
  overrated = outputs.table('def overrated(')
  gaps = overrated['proxy'] - overrated['gold']
  assert len(overrated) > 1 and (gaps.diff().dropna() < 0.02).all()
  for cell in ('kl_coef=0.01', 'kl_coef=0.3)'):
    assert len(outputs.pictures(cell)) == 2  # of gold and proxy, and of the run
  assert outputs.pictures('def frontier(')
  return summary


def check_your_own_data(outputs):
  """The reward function by hand, a comparison on new messages, and a saved model."""
  assert ast.literal_eval(outputs.text("friendliness(\n  ['']")) == [3.0, -2.0]
  assert 'other messages to test' in outputs.text('read_csv')
  comparison = outputs.table('rl.compare(')
  assert list(comparison.index) == ['sft', 'ppo']
  assert 'model.safetensors' in outputs.text('ppo.policy.save(')
  assert len(outputs.table('model = rl.load(')) == 4
  return comparison


def test_quickstart(tmp_path):
  check_quickstart(execute('quickstart', tmp_path, debug=True))


def test_ppo_step_by_step(tmp_path):
  check_ppo_step_by_step(execute('ppo_step_by_step', tmp_path, debug=True))


def test_reward_hacking(tmp_path):
  check_reward_hacking(execute('reward_hacking', tmp_path, debug=True))


def test_your_own_data(tmp_path):
  check_your_own_data(execute('your_own_data', tmp_path, debug=True))


@pytest.mark.slow
def test_notebooks_at_full_size(tmp_path):
  """PPO learns, and with a small penalty it exploits the reward model, as the texts state."""
  outputs = {}
  for path in NOTEBOOKS:
    (tmp_path / path.stem).mkdir()
    outputs[path.stem] = execute(path.stem, tmp_path / path.stem, debug=False)
  scores = check_quickstart(outputs['quickstart'])
  assert scores['gold']['ppo'] > scores['gold']['sft'] + 0.7
  check_ppo_step_by_step(outputs['ppo_step_by_step'])
  summary = check_reward_hacking(outputs['reward_hacking']).loc[['kl_coef 0.01', 'kl_coef 0.3']]
  hacked, careful = summary.to_dict('records')
  assert hacked['KL'] > 2 * careful['KL'] and hacked['proxy - gold'] > careful['proxy - gold']
  scores = check_your_own_data(outputs['your_own_data'])['Gold score']
  sft, ppo = (float(scores[name].split(' ± ')[0]) for name in ('sft', 'ppo'))
  assert ppo > sft + 2.0
