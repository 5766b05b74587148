"""Every family's file implements the interface in models/families.py."""

import dataclasses
import inspect
import types
import typing

import pytest
import test_compile_time

from rlhf_jax import models
from rlhf_jax.models import blocks
from rlhf_jax.models import families
from rlhf_jax.models import gpt2
from rlhf_jax.models import hf_config
from rlhf_jax.models import t5

PROTOCOLS = (
  dict.fromkeys(families.DECODERS, families.OneStack)
  | dict.fromkeys(families.ENCODERS, families.OneStack)
  | dict.fromkeys(families.ENCODER_DECODERS, families.EncoderDecoder)
)


def functions(cls):
  """Returns {name: function} of the constructor, the call and the public methods of a class."""
  return {
    name: method
    for base in reversed(cls.__mro__)
    if base.__module__.startswith('rlhf_jax')
    for name, method in vars(base).items()
    if inspect.isfunction(method) and (name in ('__init__', '__call__') or not name.startswith('_'))
  }


def signature_problem(found, wanted, *, bound):
  """Returns which arguments a function lacks or adds; `bound` is whether it has a self."""
  found = list(inspect.signature(found).parameters.values())
  wanted = list(inspect.signature(wanted).parameters.values())[0 if bound else 1 :]
  same = [(p.name, p.kind) for p in found[: len(wanted)]] == [(p.name, p.kind) for p in wanted]
  if same and all(p.default is not p.empty for p in found[len(wanted) :]):
    return None
  return f'has the arguments {[p.name for p in found]}, not {[p.name for p in wanted]}'


def class_problems(found, wanted):
  """Returns the methods of a class that differ from those of a protocol or a base."""
  for name, method in functions(wanted).items():
    if name == '__init__' and dataclasses.is_dataclass(wanted):
      continue  # its arguments are the fields
    problem = (
      signature_problem(getattr(found, name), method, bound=True)
      if callable(getattr(found, name, None))
      else 'is missing'
    )
    if problem:
      yield f'{name} {problem}'


def problems(module, protocol):
  """Returns what a family's module lacks of its protocol, a list of texts."""
  found = []
  for name, hint in typing.get_type_hints(protocol).items():
    value = getattr(module, name, problems)
    if value is problems:
      found.append(f'{name} is missing')
    elif typing.get_origin(hint) is not type:
      found += [] if isinstance(value, hint) else [f'{name} is no {hint}']
    else:
      wanted = typing.get_args(hint)[0]
      if not getattr(wanted, '_is_protocol', False) and not issubclass(value, wanted):
        found.append(f'{name} is no {wanted.__name__}')
      found += [f'{name}.{problem}' for problem in class_problems(value, wanted)]
  for name, method in functions(protocol).items():
    if name == '__init__':
      continue  # of typing.Protocol
    if not hasattr(module, name):
      found.append(f'{name} is missing')
    elif problem := signature_problem(getattr(module, name), method, bound=False):
      found.append(f'{name} {problem}')
  return found


@pytest.mark.parametrize('family', PROTOCOLS)
def test_every_family_fulfils_its_protocol(family):
  assert not problems(families.FAMILIES[family], PROTOCOLS[family])


@pytest.mark.parametrize('family', test_compile_time.FIELDS)
def test_every_config_has_the_attributes_that_models_read(family):
  config = test_compile_time.build(family, 2).config
  names = {name for name in dir(hf_config.Config) if not name.startswith('_')} | {
    'vocab_size',
    'tie_word_embeddings',
  }
  if family in families.ENCODER_DECODERS:
    names |= set(typing.get_type_hints(families.EncoderDecoderConfig))
  assert not [name for name in sorted(names) if getattr(config, name, names) is names]
  assert config.MODEL_TYPE == family and isinstance(config.std('embed/embedding'), float)


def changed(module, **attributes):
  """Returns a copy of a module with other attributes; None removes one."""
  kept = {name: value for name, value in (vars(module) | attributes).items() if value is not None}
  return types.SimpleNamespace(**kept)


class OtherBlock(blocks.Block):
  """A block whose call lacks the table."""

  def __call__(self, x, layer, attend):
    return attend(x, layer)


class OtherEmbedder(gpt2.Embedder):
  """An embedder with one more argument."""

  def embed_inputs(self, tokens, positions, length, mask):
    return super().embed_inputs(tokens, positions, length), mask


class OneWay(t5.Side):
  bidirectional_bias = None


@pytest.mark.parametrize(
  'module,protocol,words',
  [
    *[
      (changed(gpt2, **{name: None}), families.OneStack, f'{name} is missing')
      for name in (
        'ARCHITECTURE',
        'CLASSIFIER',
        'PREFIX',
        'UNEMBED',
        'IGNORED_TENSORS',
        'RULES',
        'Config',
        'Embedder',
        'Block',
        'sources',
      )
    ],
    *[
      (changed(t5, **{name: None}), families.EncoderDecoder, f'{name} is missing')
      for name in ('EncoderBlock', 'DecoderBlock', 'Side')
    ],
    (changed(gpt2, RULES=['x']), families.OneStack, "RULES is no <class 'tuple'>"),
    (changed(gpt2, Config=dict), families.OneStack, 'Config is no Config'),
    (changed(gpt2, Block=OtherBlock), families.OneStack, 'Block.__call__ has the arguments'),
    (
      changed(gpt2, Embedder=OtherEmbedder),
      families.OneStack,
      'Embedder.embed_inputs has the arguments',
    ),
    (changed(gpt2, sources=lambda: {}), families.OneStack, 'sources has the arguments []'),
    (changed(t5, Side=OneWay), families.EncoderDecoder, 'Side.bidirectional_bias is missing'),
    (changed(t5, DecoderBlock=t5.EncoderBlock), families.EncoderDecoder, 'DecoderBlock.__call__'),
  ],
)
def test_parts_that_a_family_lacks_are_found(module, protocol, words):
  assert words in '; '.join(problems(module, protocol))


def test_a_critic_starts_from_a_model_that_reads_single_tokens():
  for family in test_compile_time.FIELDS:
    model = test_compile_time.build(family, 1)
    assert model.has_token_states == (family not in families.ENCODERS)
  # The last is T5, whose pooled states are those of full texts.
  assert not models.create(model.config.to_hf() | {'pooled': True}).has_token_states
