"""Tokenizers in the Hugging Face folder format: loading, training, and text in mid-sequence.

Ids are taken without the tokenizer's own special tokens and put together here, so that a prompt's
ids are always a prefix of the ids of prompt and completion, and a sampled response is in the same
position as a training completion:

  prompt      [bos] + encode(prompt)      bos only where the tokenizer itself would add it
  completion  encode_continuation(completion) + [eos]

Encoder-decoders read a prompt and write a response as two texts, each of which begins and ends
(see `set_encoder_decoder`):

  prompt      encode(prompt) + [eos]
  response    encode(response) + [eos]

Some tokenizers (SentencePiece's, Llama's) put a space in front of every text they are given, and
strip it when decoding. A completion is not the beginning of a text, so `encode_continuation` and
`decode_continuation` use a copy of the tokenizer without that; otherwise "up" + "on" would be
learnt as "up on".
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import json
import os
from typing import Any
import weakref

from absl import logging
import numpy as np
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax import folders
from rlhf_jax.data import progress
from rlhf_jax.errors import UserError

PAD, BOS, EOS = '<|pad|>', '<|bos|>', '<|eos|>'
BYTES = 256
REMEDY = (
  'It must hold tokenizer.json, or vocab.json and merges.txt, of a tokenizer that needs no '
  'code of its own: nothing that a folder brings is run'
)
TOGETHER = 4096  # texts given to a backend at a time, between which a progress bar moves


def load(path: str) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer from a local folder and makes sure that it has EOS and padding tokens.

  Args:
    path: folder with tokenizer.json, or GPT-2's vocab.json and merges.txt; or of a finished run.

  Returns:
    A tokenizer with `pad_token_id` and `eos_token_id`. Without a padding token of its own it
    gets the EOS, which is safe here: no mask is ever derived from token ids. BERT's, which say
    [CLS] and [SEP] for the ends of a text, get these as BOS and EOS.

  Raises:
    UserError: there is no such folder, no tokenizer in it, or no EOS token.
  """
  path = os.fspath(folders.model(path))
  if not os.path.isdir(path):
    raise UserError(
      f'{path}: no such folder. A tokenizer is a folder with tokenizer.json in it '
      '(or vocab.json and merges.txt).'
    )
  files = set(os.listdir(path))
  kind = transformers.AutoTokenizer
  if 'tokenizer.json' not in files and {'vocab.json', 'merges.txt'} <= files:
    kind = transformers.GPT2TokenizerFast
  try:
    for name in files:
      if name.endswith(('.json', '.txt', '.jinja', '.model')):
        folders.check_file(os.path.join(path, name))
    tokenizer = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    largest = max(tokenizer.get_vocab().values(), default=0)
    tokenizer('a')
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # transformers raises many kinds; a panic is no Exception
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'{path}: no tokenizer can be loaded from this folder, which holds '
      f'{sorted(files)} ({reason}). {REMEDY}'
    ) from None
  if largest >= 2**31:
    raise UserError(f'{path}: the tokenizer has ids up to {largest}; they must be below 2^31.')
  template = tokenizer.chat_template
  texts = template.values() if isinstance(template, dict) else [template or '']
  if not all(isinstance(text, str) for text in texts):
    raise UserError(
      f'{path}: chat_template must be text, and is of type {type(template).__name__}. '
      'Mend it in tokenizer_config.json.'
    )
  if not tokenizer.is_fast:
    raise UserError(
      f'{path}: only tokenizers with a tokenizer.json are supported. Load it with '
      'transformers, convert it to a fast one and save that.'
    )
  if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
  if tokenizer.eos_token_id is None:
    raise UserError(
      f'{path}: the tokenizer has no EOS token, so nothing could end a response. '
      'Set eos_token in tokenizer_config.json.'
    )
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
    _warn_once(
      f'{path}: the tokenizer has no padding token: the EOS, {tokenizer.eos_token!r}, is '
      'used. No mask here depends on it.'
    )
  elif tokenizer.pad_token_id == tokenizer.eos_token_id:
    _warn_once(
      f'{path}: the padding token is the EOS, {tokenizer.eos_token!r}. No mask here '
      'depends on it; programs that take padding from token ids overlook the EOS.'
    )
  return tokenizer


def train_bpe(
  texts: Iterable[str], vocab_size: int, path: str
) -> transformers.PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer and saves it as a folder.

  Every string encodes and decodes back exactly, unless it spells a special token. Ids 0, 1 and 2
  are <|pad|>, <|bos|> and <|eos|>; the tokenizer begins each text with <|bos|>.

  Args:
    texts: what to learn merges from.
    vocab_size: at least 259: the 256 bytes and three special tokens.
    path: folder to write; `load` and transformers.AutoTokenizer read it.

  Returns:
    The tokenizer as read back from `path`. It has fewer tokens than asked for if the texts hold
    fewer distinct merges.

  Raises:
    UserError: vocab_size is too small.
  """
  specials = [PAD, BOS, EOS]
  if vocab_size < BYTES + len(specials):
    raise UserError(
      f'vocab_size {vocab_size} is too small for a byte-level tokenizer: at least '
      f'{BYTES + len(specials)} are needed (256 bytes, 3 special tokens).'
    )
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = hf_tokenizers.decoders.ByteLevel()
  trainer = hf_tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=specials,
    show_progress=False,
    initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(texts, trainer)
  backend.post_processor = hf_tokenizers.processors.TemplateProcessing(
    single=f'{BOS} $A', special_tokens=[(BOS, specials.index(BOS))]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=PAD,
    bos_token=BOS,
    eos_token=EOS,
    clean_up_tokenization_spaces=False,
  )
  tokenizer.save_pretrained(path)
  return load(path)


def check(tokenizer: transformers.PreTrainedTokenizerFast, model_vocab_size: int) -> None:
  """Makes sure that every token has a row of the embedding.

  Raises:
    UserError: the largest id does not fit. (A larger embedding is fine: they are often padded.)
  """
  largest = max(tokenizer.get_vocab().values())
  if largest >= model_vocab_size:
    raise UserError(
      f"the tokenizer {tokenizer.name_or_path or ''} has ids up to {largest}, but the model's "
      f'vocab_size is {model_vocab_size}. Use the tokenizer that belongs to the model, or set '
      f"the model's vocab_size to at least {largest + 1}."
    )


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning('%s', message)


def warn_unknown(
  tokenizer: transformers.PreTrainedTokenizerFast, rows: Sequence[np.ndarray]
) -> None:
  """Says in one line which share of the tokens is unknown: text that the tokenizer cannot encode.

  Args:
    tokenizer: one whose unknown token has no other use, as GPT-2's has, or nothing is said.
    rows: ids of texts, each int32 [length].
  """
  unknown = tokenizer.unk_token_id
  if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
    return
  counts = [np.count_nonzero(row == unknown) for row in rows]
  total = sum(map(len, rows))
  if sum(counts):
    logging.warning(
      '%.3g %% of the tokens (%d of %d, in %d of %d texts) are %r: text that the tokenizer '
      'cannot encode. Use one made for such text, or clean the texts.',
      100 * sum(counts) / total,
      sum(counts),
      total,
      np.count_nonzero(counts),
      len(rows),
      tokenizer.unk_token,
    )


_encoder_decoder: weakref.WeakSet[Any] = weakref.WeakSet()


def set_encoder_decoder(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
  """Makes this tokenizer that of an encoder-decoder, whose responses do not go on where prompts stop."""
  _encoder_decoder.add(tokenizer)


def fit(tokenizer: transformers.PreTrainedTokenizerFast, model: Any) -> None:
  """Checks that the tokenizer's ids fit the model's vocabulary and adapts it to the model.

  Raises:
    UserError: see `check`.
  """
  check(tokenizer, model.vocab_size)
  if model.encoder_decoder:
    set_encoder_decoder(tokenizer)


def encode(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[np.ndarray]:
  """Ids of texts that begin a sequence, each int32 [length].

  The BOS comes first if the tokenizer adds one by itself and the text does not spell it already,
  as rendered chat templates do. After `set_encoder_decoder` the EOS comes last.
  """
  bos = _leading_bos(tokenizer)
  rows = _ids(tokenizer.backend_tokenizer, texts)
  if tokenizer in _encoder_decoder:
    rows = [end(tokenizer, row) for row in rows]
  if bos is None:
    return rows
  return [row if row.size and row[0] == bos else np.insert(row, 0, bos) for row in rows]


def encode_continuation(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[np.ndarray]:
  """Ids of responses: of texts that go on where others stop, each int32 [length], no special tokens added."""
  return _ids(_responding(tokenizer), texts)


def encode_joined(
  tokenizer: transformers.PreTrainedTokenizerFast,
  prompts: Sequence[str],
  completions: Sequence[str],
) -> list[np.ndarray]:
  """Ids of prompts and of what follows each, tokenized apart, int32 [length]; without an EOS."""
  return [
    np.concatenate(pair)
    for pair in zip(encode(tokenizer, prompts), encode_continuation(tokenizer, completions))
  ]


def spans(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Of each text its ids, without BOS or EOS, and how many of its characters end with each; int32 [length]."""
  backend = tokenizer.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return [
    (np.array(one.ids, np.int32), np.array([end for _, end in one.offsets], np.int32))
    for one in _encoded(backend.encode_batch, texts)
  ]


def decode_continuation(
  tokenizer: transformers.PreTrainedTokenizerFast,
  rows: Sequence[Sequence[int]],
  *,
  skip_special_tokens: bool = True,
) -> list[str]:
  """Texts of ids that follow others, such as responses; special tokens are left out, or spelled out."""
  rows = [np.asarray(row).tolist() for row in rows]
  return _responding(tokenizer).decode_batch(rows, skip_special_tokens=skip_special_tokens)


def decode_prompts(
  tokenizer: transformers.PreTrainedTokenizerFast, rows: Sequence[np.ndarray]
) -> list[str]:
  """Texts of what is left of prompts' ids; special tokens are spelled out, but those that `encode` adds."""
  bos = _leading_bos(tokenizer)
  eos = tokenizer.eos_token_id if tokenizer in _encoder_decoder else None
  rows = [row[int(row[0] == bos) : len(row) - int(row[-1] == eos)] for row in rows]
  return decode_continuation(tokenizer, rows, skip_special_tokens=False)


def end(tokenizer: transformers.PreTrainedTokenizerFast, row: np.ndarray) -> np.ndarray:
  """The row with the EOS at its end, unless it is there already (chat templates write it)."""
  eos = tokenizer.eos_token_id
  return row if row.size and row[-1] == eos else np.append(row, np.int32(eos))


def _ids(backend: hf_tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
  # A tokenizer.json may ask for both, and calls of the Hugging Face wrapper leave them behind.
  backend.no_truncation()
  backend.no_padding()
  return [np.array(one.ids, np.int32) for one in _encoded(backend.encode_batch_fast, texts)]


def _encoded(
  encode_batch: Callable[..., list[hf_tokenizers.Encoding]], texts: Iterable[str]
) -> Iterator[hf_tokenizers.Encoding]:
  texts = list(texts)
  if len(texts) <= TOGETHER:
    yield from encode_batch(texts, add_special_tokens=False)
    return
  with progress.bar(None, 'tokenizing', 'texts', total=len(texts)) as bar:
    for start in range(0, len(texts), TOGETHER):
      encoded = encode_batch(texts[start : start + TOGETHER], add_special_tokens=False)
      yield from encoded
      bar.update(len(encoded))


def _leading_bos(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
  """The BOS id if encoding a text begins with it. GPT-2 has a BOS and does not use it so."""
  bos = tokenizer.bos_token_id
  return bos if tokenizer('a')['input_ids'][:1] == [bos] else None


def _responding(tokenizer: transformers.PreTrainedTokenizerFast) -> hf_tokenizers.Tokenizer:
  return tokenizer.backend_tokenizer if tokenizer in _encoder_decoder else _continuation(tokenizer)


# The copies, by tokenizer, with the vocabulary's size at the time: making one takes a second for a
# large vocabulary, and tokens may be added later.
_copies: weakref.WeakKeyDictionary[Any, tuple[int, hf_tokenizers.Tokenizer]] = (
  weakref.WeakKeyDictionary()
)


def _continuation(tokenizer: transformers.PreTrainedTokenizerFast) -> hf_tokenizers.Tokenizer:
  """A copy of the backend without what it does to the beginning of a text.

  See the components `Prepend`, `Metaspace`, `ByteLevel` and `Strip` in
  https://huggingface.co/docs/tokenizers/components.
  """
  size, copy = _copies.get(tokenizer, (-1, None))
  if size != len(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state['normalizer'] = _drop(state['normalizer'], 'normalizers', 'Prepend')
    state['decoder'] = _drop(state['decoder'], 'decoders', 'Strip')
    for part in ('pre_tokenizer', 'decoder'):
      _no_prefix_space(state[part])
    copy = hf_tokenizers.Tokenizer.from_str(json.dumps(state))
    _copies[tokenizer] = len(tokenizer), copy
  return copy


def _drop(component: dict[str, Any] | None, children: str, kind: str) -> dict[str, Any] | None:
  if component is None or component['type'] == kind:
    return None
  if component['type'] == 'Sequence':
    kept = [child for child in component[children] if child['type'] != kind]
    return {**component, children: kept}
  return component


def _no_prefix_space(component: dict[str, Any] | None) -> None:
  """Sets, in place, the options of a component (or of its children) that add a space."""
  if component is None:
    return
  if component['type'] == 'Metaspace':
    component['prepend_scheme'] = 'never'
  elif component['type'] == 'ByteLevel':
    component['add_prefix_space'] = False
  for child in component.get('pretokenizers') or component.get('decoders') or ():
    _no_prefix_space(child)
