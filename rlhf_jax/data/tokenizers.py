"""Loads and trains tokenizers in the Hugging Face format; encodes and decodes texts.

Texts are encoded without special tokens, which are added here. The ids of a prompt are thus always
a prefix of the ids of prompt and completion, as they are when a response is sampled:

  prompt      [bos] + ids of the prompt      bos only if the tokenizer adds it too
  completion  ids of the completion + [eos]

An encoder-decoder model has two separate texts (see `set_encoder_decoder`):

  prompt      ids of the prompt + [eos]
  response    ids of the response + [eos]

Some tokenizers (those of SentencePiece and Llama) add a space before each text and remove it when
decoding. A completion is not the start of a text, so `encode_continuation` and
`decode_continuation` use a copy of the tokenizer that does not do this. Otherwise the model would
learn "up" + "on" as "up on".
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
  'It must contain tokenizer.json, or vocab.json and merges.txt, and must not need code of its '
  'own: code in a folder is never run'
)
CHUNK = 4096  # texts that are encoded between two updates of the progress bar


def load(path: str) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer from a local folder and ensures that it has EOS and padding tokens.

  Args:
    path: Folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt; or folder of a
      finished run.

  Returns:
    A tokenizer with `pad_token_id` and `eos_token_id`. If it has no padding token, the EOS is used;
    this is safe because masks are never derived from token ids. If it has no EOS but [CLS] and
    [SEP], as BERT's, these become BOS and EOS.

  Raises:
    UserError: There is no such folder, no tokenizer in it, or no EOS token.
  """
  path = os.fspath(folders.find_model(path))
  if not os.path.isdir(path):
    raise UserError(
      f'{path}: no such folder. A tokenizer is a folder with tokenizer.json, or with vocab.json '
      'and merges.txt.'
    )
  files = set(os.listdir(path))
  loader = transformers.AutoTokenizer
  if 'tokenizer.json' not in files and {'vocab.json', 'merges.txt'} <= files:
    loader = transformers.GPT2TokenizerFast
  try:
    for name in files:
      if name.endswith(('.json', '.txt', '.jinja', '.model')):
        folders.check_file(os.path.join(path, name))
    tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    largest = max(tokenizer.get_vocab().values(), default=0)
    tokenizer('a')
  except (KeyboardInterrupt, SystemExit):
    raise
  # transformers raises many types of errors; a Rust panic is a BaseException.
  except BaseException as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'{path}: cannot load a tokenizer from this folder, which contains '
      f'{sorted(files)} ({reason}). {REMEDY}'
    ) from None
  if largest >= 2**31:
    raise UserError(f'{path}: the tokenizer has ids up to {largest}; they must be below 2^31.')
  template = tokenizer.chat_template
  texts = template.values() if isinstance(template, dict) else [template or '']
  if not all(isinstance(text, str) for text in texts):
    raise UserError(
      f'{path}: chat_template must be text, not {type(template).__name__}. Fix it in '
      'tokenizer_config.json.'
    )
  if not tokenizer.is_fast:
    raise UserError(
      f'{path}: only tokenizers with tokenizer.json are supported. Convert it to a fast tokenizer '
      'with transformers and save that.'
    )
  if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
  if tokenizer.eos_token_id is None:
    raise UserError(
      f'{path}: the tokenizer has no EOS token, which must end a response. Set eos_token in '
      'tokenizer_config.json.'
    )
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
    _warn_once(
      f'{path}: the tokenizer has no padding token; the EOS, {tokenizer.eos_token!r}, is used '
      'instead. No mask depends on it.'
    )
  elif tokenizer.pad_token_id == tokenizer.eos_token_id:
    _warn_once(
      f'{path}: the padding token is the EOS, {tokenizer.eos_token!r}. No mask depends on it, but '
      'programs that derive masks from token ids will ignore the EOS.'
    )
  return tokenizer


def train_bpe(
  texts: Iterable[str], vocab_size: int, path: str
) -> transformers.PreTrainedTokenizerFast:
  """Trains a byte-level BPE tokenizer and saves it as a folder.

  Decoding the ids of a string returns the same string, unless it contains a special token. Ids 0, 1
  and 2 are <|pad|>, <|bos|> and <|eos|>; the tokenizer starts each text with <|bos|>.

  Args:
    texts: Training texts.
    vocab_size: At least 259: the 256 bytes and three special tokens.
    path: Folder to write, for `load` and transformers.AutoTokenizer.

  Returns:
    The tokenizer, loaded from `path`. It has fewer than `vocab_size` tokens if the texts have too
    few distinct merges.

  Raises:
    UserError: `vocab_size` is too small.
  """
  specials = [PAD, BOS, EOS]
  if vocab_size < BYTES + len(specials):
    raise UserError(
      f'vocab_size={vocab_size} is too small for a byte-level tokenizer. It must be at least '
      f'{BYTES + len(specials)} (256 bytes and 3 special tokens).'
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
  """Checks that the tokenizer's ids are below the model's vocabulary size.

  A larger vocabulary is valid: embeddings are often padded.

  Raises:
    UserError: The largest id is too large.
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
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[np.ndarray]
) -> None:
  """Warns if texts contain unknown tokens, which replace text that the tokenizer cannot encode.

  Args:
    tokenizer: Tokenizer. No warning if its unknown token is also BOS, EOS or padding (GPT-2).
    texts: Token ids of texts, each int32 [length].
  """
  unknown = tokenizer.unk_token_id
  if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
    return
  counts = [np.count_nonzero(ids == unknown) for ids in texts]
  total = sum(map(len, texts))
  if sum(counts):
    logging.warning(
      '%.3g %% of the tokens (%d of %d, in %d of %d texts) are %r: the tokenizer cannot encode '
      'this text. Use a tokenizer for such texts, or clean the texts.',
      100 * sum(counts) / total,
      sum(counts),
      total,
      np.count_nonzero(counts),
      len(texts),
      tokenizer.unk_token,
    )


_encoder_decoder: weakref.WeakSet[Any] = weakref.WeakSet()


def set_encoder_decoder(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
  """Marks the tokenizer as that of an encoder-decoder: prompts and responses are separate texts."""
  _encoder_decoder.add(tokenizer)


def fit(tokenizer: transformers.PreTrainedTokenizerFast, model: Any) -> None:
  """Checks that the tokenizer's ids fit the model's vocabulary and adapts it to the model.

  Raises:
    UserError: See `check`.
  """
  check(tokenizer, model.vocab_size)
  if model.encoder_decoder:
    set_encoder_decoder(tokenizer)


def encode(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[np.ndarray]:
  """Returns the token ids of texts that start a sequence, each int32 [length].

  Adds the BOS if the tokenizer does and the text does not start with it, as rendered chat templates
  may. Adds the EOS after `set_encoder_decoder`.
  """
  bos = _leading_bos(tokenizer)
  all_ids = _ids(tokenizer.backend_tokenizer, texts)
  if tokenizer in _encoder_decoder:
    all_ids = [append_eos(tokenizer, ids) for ids in all_ids]
  if bos is None:
    return all_ids
  return [ids if ids.size and ids[0] == bos else np.insert(ids, 0, bos) for ids in all_ids]


def encode_continuation(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[np.ndarray]:
  """Returns the token ids of texts that continue others, such as responses, each int32 [length].

  Adds no special tokens.
  """
  return _ids(_response_backend(tokenizer), texts)


def encode_joined(
  tokenizer: transformers.PreTrainedTokenizerFast,
  prompts: Sequence[str],
  completions: Sequence[str],
) -> list[np.ndarray]:
  """Returns the ids of each prompt and its completion, encoded separately, each int32 [length].

  Adds no EOS after the completion.
  """
  return [
    np.concatenate(pair)
    for pair in zip(encode(tokenizer, prompts), encode_continuation(tokenizer, completions))
  ]


def spans(
  tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (ids, ends) of each text, both int32 [length], without BOS and EOS.

  `ends` is the number of characters up to the end of each token.
  """
  backend = tokenizer.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return [
    (np.array(one.ids, np.int32), np.array([end for _, end in one.offsets], np.int32))
    for one in _encoded(backend.encode_batch, texts)
  ]


def decode_continuation(
  tokenizer: transformers.PreTrainedTokenizerFast,
  sequences: Sequence[Sequence[int]],
  *,
  skip_special_tokens: bool = True,
) -> list[str]:
  """Decodes token ids that continue a text, such as those of responses."""
  lists = [np.asarray(ids).tolist() for ids in sequences]
  return _response_backend(tokenizer).decode_batch(lists, skip_special_tokens=skip_special_tokens)


def decode_prompts(
  tokenizer: transformers.PreTrainedTokenizerFast, sequences: Sequence[np.ndarray]
) -> list[str]:
  """Returns the texts of prompts, whose ids may be truncated.

  Special tokens are part of the texts, except those that `encode` adds.
  """
  bos = _leading_bos(tokenizer)
  eos = tokenizer.eos_token_id if tokenizer in _encoder_decoder else None
  sequences = [ids[int(ids[0] == bos) : len(ids) - int(ids[-1] == eos)] for ids in sequences]
  return decode_continuation(tokenizer, sequences, skip_special_tokens=False)


def append_eos(tokenizer: transformers.PreTrainedTokenizerFast, ids: np.ndarray) -> np.ndarray:
  """Appends the EOS, unless the ids already end with it, as rendered chat templates may."""
  eos = tokenizer.eos_token_id
  return ids if ids.size and ids[-1] == eos else np.append(ids, np.int32(eos))


def _ids(backend: hf_tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
  # tokenizer.json or earlier calls of the Hugging Face wrapper may have enabled both.
  backend.no_truncation()
  backend.no_padding()
  return [np.array(one.ids, np.int32) for one in _encoded(backend.encode_batch_fast, texts)]


def _encoded(
  encode_batch: Callable[..., list[hf_tokenizers.Encoding]], texts: Iterable[str]
) -> Iterator[hf_tokenizers.Encoding]:
  texts = list(texts)
  if len(texts) <= CHUNK:
    yield from encode_batch(texts, add_special_tokens=False)
    return
  with progress.bar(None, 'tokenizing', 'texts', total=len(texts)) as bar:
    for start in range(0, len(texts), CHUNK):
      encoded = encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
      yield from encoded
      bar.update(len(encoded))


def _leading_bos(tokenizer: transformers.PreTrainedTokenizerFast) -> int | None:
  """Returns the BOS id if the tokenizer starts texts with it. GPT-2's has a BOS but does not."""
  bos = tokenizer.bos_token_id
  return bos if tokenizer('a')['input_ids'][:1] == [bos] else None


def _response_backend(tokenizer: transformers.PreTrainedTokenizerFast) -> hf_tokenizers.Tokenizer:
  return tokenizer.backend_tokenizer if tokenizer in _encoder_decoder else _continuation(tokenizer)


# {tokenizer: (its size, copy of its backend)}. With a large vocabulary, a copy takes a second to
# make. The size tells whether tokens were added since, which makes the copy outdated.
_copies: weakref.WeakKeyDictionary[Any, tuple[int, hf_tokenizers.Tokenizer]] = (
  weakref.WeakKeyDictionary()
)


def _continuation(tokenizer: transformers.PreTrainedTokenizerFast) -> hf_tokenizers.Tokenizer:
  """Returns a copy of the backend that does not treat the start of a text specially.

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


def _drop(component: dict[str, Any] | None, children: str, name: str) -> dict[str, Any] | None:
  """Returns a component without the parts of type `name`."""
  if component is None or component['type'] == name:
    return None
  if component['type'] == 'Sequence':
    return {
      **component,
      children: [child for child in component[children] if child['type'] != name],
    }
  return component


def _no_prefix_space(component: dict[str, Any] | None) -> None:
  """Disables, in place, the options of a component and its children that add a space."""
  if component is None:
    return
  if component['type'] == 'Metaspace':
    component['prepend_scheme'] = 'never'
  elif component['type'] == 'ByteLevel':
    component['add_prefix_space'] = False
  for child in component.get('pretokenizers') or component.get('decoders') or ():
    _no_prefix_space(child)
