"""Drawings of several threads at once have one style each."""

import re
import threading

import matplotlib

from rlhf_jax import svg


def test_threads_draw_one_after_the_other():
  """matplotlib's style is one for the process: two at once would leave it changed."""
  drawing, before = threading.Event(), dict(matplotlib.rcParams)
  pictures = []
  other = threading.Thread(
    target=lambda: pictures.append(svg.inline(lambda figure: drawing.set(), (1, 1), 'second'))
  )

  def draw(figure):
    del figure
    other.start()
    assert not drawing.wait(0.2)

  pictures.append(svg.inline(draw, (1, 1), 'first'))
  other.join(60)
  assert sorted(re.findall('aria-label="([^"]*)"', ''.join(pictures))) == ['first', 'second']
  assert dict(matplotlib.rcParams) == before
