"""Incremental detokenization: the text of a response in pieces, while its tokens are sampled."""

from collections.abc import Sequence

import transformers

from rlhf_jax import errors
from rlhf_jax.data import tokenizers
from rlhf_jax.rollout.stops import REPLACEMENT


class Detokenizer:
  """Returns the text of one response piece by piece.

  All tokens so far are decoded together, because decoders join some of them: the bytes of a
  character, or words and the spaces between them. Text that later tokens may still change is held
  back: an incomplete character, and the beginning of a stop string.

  Attributes:
    tokens: Token ids of the response so far.
    text: Text returned so far.
    stopped: Whether a stop string has ended the response. The string is not part of the text; the
      token that completes it is the last one of `tokens`, as in `stops.truncate_at_strings`.
  """

  def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, stop: Sequence[str] = ()):
    """Starts a response.

    Args:
      tokenizer: Tokenizer of the policy.
      stop: Strings that end a response; special tokens are not part of the text, so they are not
        found in it.

    Raises:
      UserError: A stop string is empty.
    """
    errors.need(all(stop), 'a stop string is empty and would end every response: remove it')
    self.tokens, self.text, self.stopped = [], '', False
    self._tokenizer, self._stop, self._returned = tokenizer, tuple(stop), 0

  def push(self, tokens: Sequence[int]) -> str:
    """Adds tokens, up to one that completes a stop string; returns the new text, perhaps ''."""
    text = ''
    for step in [[token] for token in tokens] if self._stop else [tokens]:
      self.tokens += step
      text += self._advance()
      if self.stopped:
        break
    return text

  def finish(self) -> str:
    """Returns the text that was held back; incomplete characters become U+FFFD."""
    if self.stopped:
      return ''
    text = self._decode(0)
    if not text.startswith(self.text):
      # A decoder with byte fallback replaces a whole run of bytes if the last character is broken.
      text = self.text + self._decode(self._returned)
    return self._take(text)

  def _advance(self):
    text = self._decode(0)
    if not text.startswith(self.text):
      return ''
    found = [start for start in map(text.find, self._stop) if start >= 0]
    if found:
      self.stopped = True
      return self._take(text[: max(min(found), len(self.text))])
    if text.endswith(REPLACEMENT):
      return ''
    return self._take(text[: max(len(text) - self._held(text), len(self.text))])

  def _held(self, text):
    """Returns how many characters at the end of the text may begin a stop string."""
    lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)

  def _take(self, text):
    piece, self.text, self._returned = text[len(self.text) :], text, len(self.tokens)
    return piece

  def _decode(self, start):
    return tokenizers.decode_continuation(self._tokenizer, [self.tokens[start:]])[0]
