"""The notebook, executed from top to bottom with the debug config."""

import json
import pathlib

import pytest

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
pytest.importorskip('ipykernel')

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / 'notebooks'


def test_quickstart_notebook_shows_table_report_and_samples(tmp_path, monkeypatch):
  monkeypatch.setenv('QUICKSTART_DEBUG', '1')
  monkeypatch.setenv('QUICKSTART_WORKDIR', str(tmp_path))
  monkeypatch.delenv('XLA_FLAGS')  # The eight devices of conftest.py are not the notebook's.
  monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '1')  # This interpreter, not a registered kernel.
  notebook = nbformat.read(NOTEBOOKS / 'quickstart.ipynb', as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(NOTEBOOKS)}}
  ).execute()
  printed = {
    name: output_of(notebook, name)
    for name in ('stages_table', 'display.HTML', 'rlhf_jax.generate')
  }
  stages = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())['stages']
  names = [row['stage'] for row in stages]
  assert len(names) == 4 and {'sft', 'ppo'} < set(names)
  for name in names:
    assert f'\n  {name} ' in printed['stages_table']
  assert '<iframe' in printed['display.HTML'] and '&lt;svg' in printed['display.HTML']
  before, after = printed['rlhf_jax.generate'].split('----- ppo')
  assert before.count('Review of the toaster:') == after.count('Review of the toaster:') == 4


def output_of(notebook, text):
  """What the one code cell that contains `text` printed or displayed."""
  [cell] = [c for c in notebook.cells if c.cell_type == 'code' and text in c.source]
  return ''.join(
    output.get('text', '') + output.get('data', {}).get('text/html', '') for output in cell.outputs
  )
