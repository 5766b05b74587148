"""Rule-based rewards on texts counted by hand."""

import pytest

from rlhf_jax.rewards import functions
from rlhf_jax.tasks import stories

TEXTS = {
  'none': ('He left. She stayed.', 0.0),
  'one of two': ('"Go," he said. She stayed.', 1 / 2),
  'the quotation closes the sentence': ('He said "go." She stayed. All was well!', 1 / 3),
  'all': ('"Why?" "Because!"', 1.0),
  'an unfinished sentence does not count': ('He left. "And then', 0.0),
  'nothing finished': ('"And then', 0.0),
  'empty': ('', 0.0),
  'dots in a row are one end': ('Well... "Yes."', 1 / 2),
}


@pytest.mark.parametrize('text, share', TEXTS.values(), ids=TEXTS)
def test_direct_speech(text, share):
  assert stories.direct_speech_of('"Prompts" do not count.', text) == pytest.approx(share)


def test_direct_speech_is_a_reward_function():
  texts = [text for text, _ in TEXTS.values()]
  function = functions.load('rlhf_jax.tasks.stories:direct_speech')
  scores = functions.call(
    function,
    [''] * len(texts),
    texts,
    response_tokens=[[]] * len(texts),
    metadata=[{}] * len(texts),
    response_length=3,
  )
  assert scores.tolist() == pytest.approx([share for _, share in TEXTS.values()])
