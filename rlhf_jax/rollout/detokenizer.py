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
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    # Numbers of tokens, and their text: of those that are decoded apart from the later ones, and of
    # those whose text was complete.
    self._apart = self._complete = 0, ''

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
    return '' if self.stopped else self._take(self._decoded())

  def _advance(self):
    text = self._decoded()
    found = [start for start in map(text.find, self._stop) if start >= 0]
    if found:
      self.stopped = True
      return self._take(text[: max(min(found), len(self.text))])
    if text.endswith(REPLACEMENT):
      return ''
    self._complete = len(self.tokens), text
    return self._take(text[: max(len(text) - self._held(text), len(self.text))])

  def _held(self, text):
    """Returns how many characters at the end of the text may begin a stop string."""
    lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)

  def _take(self, text):
    piece, self.text = text[len(self.text) :], text
    return piece

  def _decoded(self):
    """Returns the text of all tokens, which begins with what was returned.

    A decoder with byte fallback replaces a whole run of bytes if one character of it is broken. The
    characters before it that were complete keep their text: what follows them is decoded apart.
    """
    text = self._decode(*self._apart)
    if not text.startswith(self.text):
      self._apart = self._complete
      text = self._decode(*self._apart)
    return text

  def _decode(self, start, before):
    return before + tokenizers.decode_continuation(self._tokenizer, [self.tokens[start:]])[0]
