"""Malicious folders, templates and texts: no code in them runs; each gives one line soon."""

import collections
import dataclasses
import html.parser
import json
import os
import pickle
import shutil
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import errors
from rlhf_jax import generate
from rlhf_jax import models
from rlhf_jax import runtime
from rlhf_jax.data import chat
from rlhf_jax.data import time_limit
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation import tables
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft
from rlhf_jax.models import trainable
import tiny

SINGLE = 'model.safetensors'
WEIGHTS = 'adapter_model.safetensors'
UP = 'model.layers.1.mlp.up_proj.weight'
QUERY = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """Returns a model with its tokenizer, and an adapter of it."""
  root = tmp_path_factory.mktemp('good')
  tiny.write_model(root / 'model', tiny.LLAMA)
  model, params = hf.load(root / 'model')
  adapted = dataclasses.replace(model, lora=lora_lib.Lora((('attention/query$', 2, 4.0),)))
  peft.save(root / 'adapter', adapted, trainable.split_trainable(adapted, params)[0])
  return root


@pytest.fixture
def marker(tmp_path, monkeypatch):
  """Returns the file that code in a folder would create; answers yes to any question to run it."""
  monkeypatch.setattr('builtins.input', lambda *_: 'y')
  monkeypatch.setenv('MARKER', str(tmp_path / 'ran'))
  monkeypatch.setattr(sys, 'path', list(sys.path))
  return tmp_path / 'ran'


class Bomb:
  """Creates the marker when it is unpickled."""

  def __reduce__(self):
    return (eval, ("__import__('pathlib').Path(__import__('os').environ['MARKER']).touch()",))


CODE = """
import os, pathlib
pathlib.Path(os.environ['MARKER']).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
  pass
class Config(PretrainedConfig):
  model_type = 'own'
"""


def fields(file, **changes):
  """Changes keys of a JSON file; a function is called with the current value."""

  def change(folder):
    found = json.loads((folder / file).read_text())
    for name, value in changes.items():
      found[name] = value(found.get(name)) if callable(value) else value
    (folder / file).write_text(json.dumps(found))

  return change


def content(file, data):
  return lambda folder: (folder / file).write_bytes(
    data if isinstance(data, bytes) else data.encode()
  )


def pipe(file):
  """Creates a file that never ends, so that its reader would wait forever."""

  def change(folder):
    (folder / file).unlink()
    os.mkfifo(folder / file)

  return change


def link(file, target):
  def change(folder):
    (folder / file).unlink()
    (folder / file).symlink_to(target)

  return change


def sparse(file, size):
  """Creates a file with a large size that occupies no space."""
  return lambda folder: os.truncate(folder / file, size)


def pickled(file, name):
  """Replaces safetensors by a pickle that runs code."""

  def change(folder):
    (folder / file).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))

  return change


def code(file, **keys):
  """Adds code to the folder, which its JSON names."""

  def change(folder):
    (folder / 'own.py').write_text(CODE)
    fields(file, **keys)(folder)

  return change


def header(change):
  """Changes the header of the weights, a dict, or replaces its bytes."""

  def apply(folder):
    data = (folder / SINGLE).read_bytes()
    size = int.from_bytes(data[:8], 'little')
    found = change(json.loads(data[8 : 8 + size]))
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])

  return apply


def entry(**changes):
  return header(lambda found: found | {UP: found[UP] | changes})


def tensor(file, name, change):
  def apply(folder):
    tensors = safetensors.numpy.load_file(folder / file)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    safetensors.numpy.save_file(tensors, folder / file)

  return apply


def with_nan(array):
  return np.where(np.arange(array.size).reshape(array.shape) == 1, np.float32('nan'), array)


FOLDERS = {
  # models
  'model: pickle alone': (
    pickled(SINGLE, 'pytorch_model.bin'),
    r'pytorch_model.bin, ...\) to safetensors',
  ),
  'model: header of 2^63 bytes': (
    lambda folder: content(SINGLE, (2**63).to_bytes(8, 'little') + b'x' * 99)(folder),
    'cannot be read as safet',
  ),
  'model: tensor of a terabyte': (
    entry(shape=[2**19, 2**19], data_offsets=[0, 2**40]),
    'cannot be read as safeten',
  ),
  'model: sizes whose product overflows': (
    entry(shape=[2**40, 2**40]),
    'cannot be read as safetensors',
  ),
  'model: offsets that overlap': (entry(data_offsets=[0, 2048]), 'cannot be read as safetensors'),
  'model: negative offsets': (entry(data_offsets=[-2048, 0]), 'cannot be read as safetensors'),
  'model: unknown dtype': (entry(dtype='OBJECT'), 'cannot be read as safetensors'),
  'model: header nested without end': (
    header(lambda _: b'{"a":' * 99999),
    'cannot be read as safetensors',
  ),
  'model: integers': (tensor(SINGLE, UP, lambda x: x.astype(np.int32)), 'is I32'),
  'model: NaN': (tensor(SINGLE, UP, with_nan), 'NaN or infinity in layers.1.mlp.up_proj.weight'),
  'model: weights are a pipe': (pipe(SINGLE), 'a folder, a device or a pipe'),
  'model: index leads to a device': (
    lambda folder: (
      content(f'{SINGLE}.index.json', '{"weight_map": {"a": "/dev/zero"}}')(folder),
      (folder / SINGLE).unlink(),
    ),
    'it must name a file in the same folder',
  ),
  'model: config is a pipe': (pipe('config.json'), 'cannot be read: is a device or a pipe'),
  'model: config is a device': (
    link('config.json', '/dev/zero'),
    'cannot be read: is a device or a pipe',
  ),
  'model: config leads to itself': (
    link('config.json', 'config.json'),
    'cannot be read: Too many levels of symb',
  ),
  'model: config of a terabyte': (
    sparse('config.json', 2**40),
    'cannot be read: has 1099511627776 bytes',
  ),
  'model: head of a terabyte': (
    fields('config.json', head_dim=2**40),
    'head_dim=1099511627776: must be at most 65536',
  ),
  'model: vocabulary of a terabyte': (
    fields('config.json', vocab_size=2**40),
    r'expected \(1099511627776, 16\)',
  ),
  'model: negative depth': (
    fields('config.json', num_hidden_layers=-1),
    'num_hidden_layers=-1: must be a positive',
  ),
  'model: a megabyte for a name': (
    fields('config.json', hidden_act='x' * 2**20),
    r'\.\.\. \(1048578 characters\)',
  ),
  'model: commands to the terminal': (
    fields('config.json', model_type='\x1b]0;owned\x07\x1b[2J'),
    r"'\\x1b\]0;owned\\x07\\x1b\[2J' is not supported",
  ),
  # adapters
  'adapter: pickle alone': (
    pickled(WEIGHTS, 'adapter_model.bin'),
    r'adapter_model.bin, ...\) to safetensors',
  ),
  'adapter: NaN': (tensor(WEIGHTS, QUERY, with_nan), 'NaN or infinity in .*q_proj.lora_A'),
  'adapter: integers': (
    tensor(WEIGHTS, QUERY, lambda x: x.astype(np.int8)),
    'is I8, which is not floating point',
  ),
  'adapter: larger than its model': (
    tensor(WEIGHTS, QUERY, lambda x: np.zeros((2**12, 16), np.float32)),
    r'shape \(4096, 16\), which no adapter',
  ),
  'adapter: scale is text': (
    fields('adapter_config.json', lora_alpha='much'),
    "lora_alpha='much'.* must be a number",
  ),
  'adapter: pattern is no regex': (
    fields('adapter_config.json', alpha_pattern={'((': 2.0}),
    r"'\(\(', which is not a re",
  ),
  # tokenizers
  'tokenizer: code of its own': (
    code(
      'tokenizer_config.json',
      tokenizer_class='Own',
      auto_map={'AutoTokenizer': ['own.Own', 'own.Own']},
    ),
    'custom code.*code in a folder is never run',
  ),
  'tokenizer: vocabulary is a list': (
    fields('tokenizer.json', model=lambda found: found | {'vocab': [1, 2]}),
    'expected a map',
  ),
  'tokenizer: negative id': (
    fields('tokenizer.json', model=lambda found: found | {'vocab': found['vocab'] | {'w1': -1}}),
    'expected u32',
  ),
  'tokenizer: id beyond 32 bits': (
    fields('tokenizer.json', model=lambda found: found | {'vocab': found['vocab'] | {'w1': 2**31}}),
    'below 2.31',
  ),
  'tokenizer: adds a token that it does not know': (
    fields('tokenizer.json', post_processor=lambda found: found | {'special_tokens': {}}),
    'no entry found',
  ),
  'tokenizer: nested without end': (content('tokenizer.json', '[' * 99999), 'recursion'),
  'tokenizer: random bytes': (
    content('tokenizer.json', bytes(range(256))),
    'cannot load a tokenizer',
  ),
  'tokenizer: a pipe': (pipe('tokenizer.json'), 'is a device or a pipe'),
  'tokenizer: a terabyte': (sparse('tokenizer.json', 2**40), 'has 1099511627776 bytes'),
  'tokenizer: length is text': (
    fields('tokenizer_config.json', model_max_length='long'),
    'cannot load a tokenizer',
  ),
  'tokenizer: class is a list': (
    fields('tokenizer_config.json', tokenizer_class=['a']),
    'cannot load a tokenizer',
  ),
  'tokenizer: EOS is a number': (
    fields('tokenizer_config.json', eos_token=3),
    'eos_token has to be either str',
  ),
  'tokenizer: template is a number': (
    fields('tokenizer_config.json', chat_template=3),
    'chat_template must be text',
  ),
}


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('case', FOLDERS)
def test_hostile_folder(case, good, marker, tmp_path):
  change, message = FOLDERS[case]
  shutil.copytree(good, tmp_path / 'good')
  kind, name = case.partition(':')[0], 'adapter' if case.startswith('adapter') else 'model'
  folder = tmp_path / 'good' / name
  load = {
    'model': hf.load,
    'tokenizer': tokenizers.load,
    'adapter': lambda path: peft.load(path, models.create(tiny.LLAMA)),
  }[kind]
  load(folder)
  change(folder)
  began = time.process_time()
  with pytest.raises(UserError, match=message) as raised:
    load(folder)
  assert not marker.exists()
  assert time.process_time() - began < 5 and len(str(raised.value)) < 2000


def test_there_are_40():
  assert len(FOLDERS) >= 40


def test_code_beside_a_model_is_not_run(good, marker, tmp_path):
  """The weights are those of a known family, so the named code is not needed."""
  shutil.copytree(good / 'model', tmp_path / 'model')
  code('config.json', auto_map={'AutoConfig': 'own.Config', 'AutoModelForCausalLM': 'own.Model'})(
    tmp_path / 'model'
  )
  hf.load(tmp_path / 'model')
  tokenizers.load(tmp_path / 'model')
  assert not marker.exists()


OUTSIDE = 'the chat template rejects this conversation'
TEMPLATES = {
  'loops without end': (
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    'took more than 0.25 s',
  ),
  'calls without end': (
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}',
    'took more than 0',
  ),
  'recursion': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', OUTSIDE),
  'a long range': ('{{ range(10 ** 9) | list }}', OUTSIDE),
  'ten terabytes': ("{{ 'x' * 10 ** 13 }}", OUTSIDE),
  'classes': ("{{ ''.__class__.__mro__[1].__subclasses__() }}", OUTSIDE),
  'modules': ("{{ cycler.__init__.__globals__.os.popen('touch $MARKER').read() }}", OUTSIDE),
  'changes of the messages': ('{{ messages.append(1) }}', OUTSIDE),
  'files': ("{% include '/etc/passwd' %}", OUTSIDE),
  'an error': ('{{ 1 / 0 }}', OUTSIDE),
  'no Jinja': ('{% for %}', 'is not valid Jinja'),
}


@pytest.mark.parametrize('case', TEMPLATES)
def test_hostile_template(case, good, marker, monkeypatch):
  template, message = TEMPLATES[case]
  monkeypatch.setattr(chat, 'TEMPLATE_SECONDS', 0.25)
  tokenizer = tokenizers.load(good / 'model')
  tokenizer.chat_template = template
  with pytest.raises((UserError, chat.Malformed), match=message):
    chat.render(tokenizer, [{'role': 'user', 'content': 'w1'}])
  assert not marker.exists()


def test_the_limit_is_raised_only_in_the_body_and_only_if_exceeded():
  with time_limit.seconds(5):
    pass
  for _ in range(2):  # the next one has its own limit
    with pytest.raises(time_limit.Exceeded), time_limit.seconds(0.1):
      while True:
        pass
  total = sum(range(1000))
  time.sleep(3 * time_limit.POLL)
  assert total == 499500


TEXTS = [
  '<script>x()</script>',
  '"><img src=x onerror=x()>',
  "' onload='x()",
  '</pre></style><svg onload=x()>',
  '&lt;b&gt;',
  '{{ 7 * 7 }}{% raw %}',
  '<!--',
  '-->',
  ']]>',
  'javascript:x()',
  '</text><g id="x" onclick="x()">',
  '\x00\x1b[2J\u202e',
]


class Elements(html.parser.HTMLParser):
  """Counts elements with the names of their attributes, and stores the text."""

  def __init__(self, page):
    super().__init__()
    self.seen, self.text = collections.Counter(), []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.seen[tag, *sorted(name for name, _ in attrs)] += 1

  def handle_comment(self, data):
    self.seen['comment', data] += 1

  def handle_data(self, data):
    self.text.append(data)


def page(path, text):
  """Returns a report in which all data are `text`, with a number where names must differ."""
  report.write(
    path,
    title=text,
    summary=text,
    config_text=json.dumps({'run': {text: text}}, ensure_ascii=False),
    stages=[{'stage': text, 'gold': 1.0, text: text}],
    metrics={
      text: [
        {'step': step, f'{text}loss': 1.0, f'eval/{text}loss': 2.0, f'{text}kl': 3.0}
        for step in (0, 1)
      ]
    },
    samples=[{'prompt': text, 'before': text, 'after': text, 'scores': {'after': {text: 1.0}}}],
    frontier=[{'step': text, 'kl': 1.0, 'gold': 1.0}],
    elo={text: {'elo': 1000.0, 'low': 990.0, 'high': 1010.0}},
  )
  return Elements(path.read_text(encoding='utf-8'))


SVG = {'svg', 'g', 'text', 'tspan', 'path', 'use', 'defs', 'clippath', 'rect', 'style'}


@pytest.mark.filterwarnings('ignore:.*(Glyph|constrained_layout)')
def test_the_report_has_no_element_from_its_data(tmp_path):
  """Hostile texts give the same elements, attributes and comments as a plain word."""
  plain, hostile = (
    page(tmp_path / 'plain.html', 'word'),
    page(tmp_path / 'hostile.html', ''.join(TEXTS)),
  )
  shown = ''.join(hostile.text)
  assert all(text in shown for text in TEXTS[:-1])
  # The number of ticks of a figure depends on the width of its labels.
  page_alone = lambda found: {key: count for key, count in found.seen.items() if key[0] not in SVG}
  assert page_alone(hostile) == page_alone(plain)
  assert set(hostile.seen) - set(plain.seen) <= {('path', 'style')}  # figures differ


ESCAPES = '\x1b]0;owned\x07\x1b[2Jtext\r\x9b31m\x7f\n\tend'


def test_samples_tell_a_terminal_nothing(monkeypatch, capsys):
  samples = collections.namedtuple('Samples', 'responses')([ESCAPES])
  policy = collections.namedtuple('Policy', 'sample')(lambda *_, **__: samples)
  monkeypatch.setattr(generate.policy_lib.TextPolicy, 'load', lambda *_, **__: policy)
  monkeypatch.setattr(runtime, 'configure', lambda: None)
  if not generate.flags.FLAGS.is_parsed():
    generate.flags.FLAGS(['generate', '--model=x'])
  generate.main([])
  assert capsys.readouterr().out == f'{ESCAPES}\n'  # files get the sampled text unchanged
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  generate.main([])
  assert capsys.readouterr().out == r'\x1b]0;owned\x07\x1b[2Jtext\x0d\x9b31m\x7f' + '\n\tend\n'


def test_errors_and_tables_tell_a_terminal_nothing(monkeypatch, capsys):
  monkeypatch.setattr(os, '_exit', lambda status: None)
  runtime.exit_now(f'error: {ESCAPES}', 1)
  printed = capsys.readouterr().err + tables.stages_table([{'stage': ESCAPES, 'note': ESCAPES}])
  assert not errors.CONTROL_CHARACTERS.search(printed) and r'\x1b]0;owned' in printed
