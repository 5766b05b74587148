"""Loading and training tokenizers, and encoding of text that continues other text."""

import json
import random

import numpy as np
import pytest
import tokenizers as hf_tokenizers
import transformers

from rlhf_jax.data import progress
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
import tiny

# Spaces at both ends, doubled, before punctuation; bytes outside the training texts.
STRINGS = ['', ' ', 'a b  c .\n\n', " it 's , ok ?", 'caf\xe9 \u2603 \U0001f600\t\r\n', '\x00\x7f']


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('bpe'))
  return tokenizers.train_bpe(['the cat sat on the mat', 'the hat'] * 5, 270, path), path


def lists(rows):
  assert all(row.dtype == np.int32 for row in rows)
  return [row.tolist() for row in rows]


def test_trained_tokenizer(bpe):
  tokenizer, path = bpe
  assert len(tokenizer) == 270
  assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ['<|pad|>', '<|bos|>', '<|eos|>']
  assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
  again = transformers.AutoTokenizer.from_pretrained(path)
  for text in STRINGS:
    ids = tokenizer(text)['input_ids']
    assert ids[0] == 1 and again(text)['input_ids'] == ids
    assert again.decode(ids[1:]) == tokenizer.decode(ids[1:]) == text


def test_training_merges_frequent_pairs_and_is_deterministic(bpe, tmp_path):
  tokenizer, path = bpe
  assert len(tokenizer('the the')['input_ids']) == 3  # BOS, "the", " the".
  tokenizers.train_bpe(['the cat sat on the mat', 'the hat'] * 5, 270, str(tmp_path))
  read = lambda folder: json.load(open(f'{folder}/tokenizer.json', encoding='utf-8'))
  assert read(path) == read(tmp_path)


def test_vocabulary_too_small_for_bytes(tmp_path):
  with pytest.raises(UserError, match='vocab_size=258 is too small.*at least 259'):
    tokenizers.train_bpe(['a'], 258, str(tmp_path))


def test_prompt_begins_with_bos_once(bpe):
  tokenizer, _ = bpe
  letters = tokenizer.convert_tokens_to_ids(['a', 'b'])
  assert lists(tokenizers.encode(tokenizer, ['ab', '<|bos|>ab', ''])) == [
    [1, *letters],
    [1, *letters],
    [1],
  ]
  assert lists(tokenizers.encode_continuation(tokenizer, ['ab', ''])) == [letters, []]


def test_end_adds_one_eos(bpe):
  tokenizer, _ = bpe
  rows = tokenizers.encode_continuation(tokenizer, ['', 'a', 'a<|eos|>'])
  a = tokenizer.convert_tokens_to_ids('a')
  assert lists([tokenizers.append_eos(tokenizer, row) for row in rows]) == [[2], [a, 2], [a, 2]]


def test_continuations_round_trip(bpe):
  tokenizer, _ = bpe
  rows = tokenizers.encode_continuation(tokenizer, STRINGS)
  assert tokenizers.decode_continuation(tokenizer, rows) == STRINGS
  ended = [tokenizers.append_eos(tokenizer, row) for row in rows]
  assert tokenizers.decode_continuation(tokenizer, ended) == STRINGS


def test_added_tokens_are_seen(bpe):
  tokenizer = tokenizers.load(bpe[1])
  tokenizers.encode_continuation(tokenizer, ['a'])
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_end|>']})
  assert lists(tokenizers.encode_continuation(tokenizer, ['<|im_end|>'])) == [[270]]


def test_truncation_and_padding_of_the_folder_are_not_ours(bpe):
  tokenizer = tokenizers.load(bpe[1])
  tokenizer(['a', 'abc'], truncation=True, max_length=2, padding='max_length')
  assert list(map(len, tokenizers.encode(tokenizer, ['a', 'abcd']))) == [2, 5]
  assert list(map(len, tokenizers.encode_continuation(tokenizer, ['a', 'abcd']))) == [1, 4]


def test_check(bpe):
  tokenizer, _ = bpe
  tokenizers.check(tokenizer, 270)
  tokenizers.check(tokenizer, 512)
  with pytest.raises(UserError, match=r"ids up to 269, but the model's vocab_size is 269.*270"):
    tokenizers.check(tokenizer, 269)


def test_folders_without_a_tokenizer(tmp_path):
  with pytest.raises(UserError, match='no such folder'):
    tokenizers.load(str(tmp_path / 'none'))
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=r"cannot load a tokenizer .*\['config\.json'\]"):
    tokenizers.load(str(tmp_path))


def test_missing_pad_becomes_eos_and_missing_eos_is_an_error(bpe, tmp_path):
  backend = bpe[0].backend_tokenizer
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token='<|eos|>'
  ).save_pretrained(tmp_path / 'eos')
  tokenizer = tokenizers.load(str(tmp_path / 'eos'))
  assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / 'no')
  with pytest.raises(UserError, match='no EOS token'):
    tokenizers.load(str(tmp_path / 'no'))


def test_padding_with_the_eos_is_reported_once(bpe, tmp_path, caplog):
  backend = bpe[0].backend_tokenizer
  make = lambda **tokens: transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token='<|eos|>', **tokens
  )
  make(pad_token='<|pad|>').save_pretrained(tmp_path / 'own')
  make().save_pretrained(tmp_path / 'none')
  make(pad_token='<|eos|>').save_pretrained(tmp_path / 'eos')
  for _ in range(2):
    for name in ('own', 'none', 'eos'):
      tokenizers.load(str(tmp_path / name))
  first, second = [record.getMessage() for record in caplog.records]
  assert first.startswith(
    f"{tmp_path / 'none'}: the tokenizer has no padding token; the EOS, '<|eos|>', is used"
  )
  assert second.startswith(f"{tmp_path / 'eos'}: the padding token is the EOS, '<|eos|>'")


def test_unknown_tokens_are_counted(tmp_path, bpe, caplog):
  known = tiny.write_tokenizer(tmp_path, words=3)
  rows = tokenizers.encode(known, ['w0 w1', 'w2 what ever', 'w1 so'])  # each with a BOS
  tokenizers.warn_unknown(known, rows)
  (record,) = caplog.records
  assert record.getMessage().startswith(
    "30 % of the tokens (3 of 10, in 2 of 3 texts) are '<|unk|>'"
  )
  caplog.clear()
  tokenizers.warn_unknown(known, rows[:1])
  tokenizers.warn_unknown(bpe[0], tokenizers.encode(bpe[0], STRINGS))  # no bytes are unknown
  known.unk_token = '<|eos|>'  # as in GPT-2
  tokenizers.warn_unknown(known, [np.array([tiny.EOS])])
  assert not caplog.records


def test_many_texts_are_encoded_like_few_and_with_a_progress_bar(bpe, monkeypatch, capsys):
  texts = [f'the {number} cats' for number in range(10)]
  encoded = lambda: (
    lists(tokenizers.encode(bpe[0], texts)),
    [lists(pair) for pair in tokenizers.spans(bpe[0], texts)],
  )
  whole = encoded()
  assert not capsys.readouterr().err
  monkeypatch.setattr(tokenizers, 'CHUNK', 4)
  monkeypatch.setattr(progress, 'DELAY_SECONDS', 0.0)
  assert encoded() == whole
  assert 'tokenizing' in capsys.readouterr().err
  tokenizers.encode(bpe[0], texts[:4])
  assert not capsys.readouterr().err


def test_stories260k(shared):
  tokenizer = tokenizers.load(str(shared / 'models/stories260K'))
  text = "Once upon a time, Lily's caf\xe9 had 3 dogs.\n"
  (ids,) = tokenizers.encode(tokenizer, [text])
  assert len(ids) == 21 and ids[0] == tokenizer.bos_token_id == 1
  assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_space_between_prompt_and_completion(shared):
  """A SentencePiece-like tokenizer adds a space before each text; completions get none."""
  tokenizer = tokenizers.load(str(shared / 'models/stories260K'))
  words = ['up', 'on', ' time', '.', '\n', 'Lily', ' ', "'s"]
  rng = random.Random(0)
  for _ in range(50):
    prompt = 'Once' + ''.join(rng.choices(words, k=3))
    completion = ''.join(rng.choices(words, k=3))
    (first,) = tokenizers.encode(tokenizer, [prompt])
    (rest,) = tokenizers.encode_continuation(tokenizer, [completion])
    assert tokenizer.decode([*first, *rest], skip_special_tokens=True) == prompt + completion
    assert tokenizers.decode_continuation(tokenizer, [rest]) == [completion]


def test_gpt2_files(shared):
  tokenizer = tokenizers.load(str(shared / 'models/gpt2-tokenizer'))
  assert lists(tokenizers.encode(tokenizer, ['Hello world'])) == [[15496, 995]]
  assert tokenizer.eos_token_id == tokenizer.pad_token_id == 50256
  rows = tokenizers.encode_continuation(tokenizer, STRINGS)
  assert tokenizers.decode_continuation(tokenizer, rows) == STRINGS


def test_randomwalks_has_no_leading_bos(shared):
  tokenizer = tokenizers.load(str(shared / 'models/randomwalks'))
  assert lists(tokenizers.encode(tokenizer, ['abu'])) == [[0, 1, 20]]
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (21, 22)
  tokenizers.check(tokenizer, 23)


def test_encoder_decoders_read_and_write_texts_that_end(tmp_path):
  """T5's tokenizer adds a space before each text, and an EOS after the encoder's input."""
  vocabulary = {'<pad>': 0, '</s>': 1, '<unk>': 2, '\u2581go': 3, '\u2581on': 4, 'on': 5}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = hf_tokenizers.decoders.Metaspace()
  backend.post_processor = hf_tokenizers.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='</s>', unk_token='<unk>'
  ).save_pretrained(tmp_path)
  tokenizer = tokenizers.load(tmp_path)
  assert [row.tolist() for row in tokenizers.encode(tokenizer, ['go on'])] == [[3, 4]]
  assert [row.tolist() for row in tokenizers.encode_continuation(tokenizer, ['on'])] == [[5]]
  tokenizers.set_encoder_decoder(tokenizer)
  assert [row.tolist() for row in tokenizers.encode(tokenizer, ['go on', ''])] == [[3, 4, 1], [1]]
  assert [row.tolist() for row in tokenizers.encode_continuation(tokenizer, ['on'])] == [[4]]
  assert tokenizers.decode_continuation(tokenizer, [[4, 3, 1]]) == ['on go']


def test_berts_ends_are_bos_and_eos(tmp_path):
  vocabulary = {'[PAD]': 0, '[CLS]': 1, '[SEP]': 2, '[UNK]': 3, 'go': 4, '##ing': 5}
  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]'))
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.BertPreTokenizer()
  backend.post_processor = hf_tokenizers.processors.BertProcessing(('[SEP]', 2), ('[CLS]', 1))
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token='[PAD]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    unk_token='[UNK]',
  ).save_pretrained(tmp_path)
  tokenizer = tokenizers.load(tmp_path)
  (row,) = tokenizers.encode(tokenizer, ['going'])
  assert (
    tokenizers.append_eos(tokenizer, row).tolist()
    == tokenizer('going')['input_ids']
    == [1, 4, 5, 2]
  )
