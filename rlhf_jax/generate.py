"""python -m rlhf_jax.generate --model DIR --prompt "..."
python -m rlhf_jax.generate --model DIR --data FILE

Text from a Hugging Face folder, from a finished run, or from the newest checkpoint of a run
that has not finished.
"""

import functools
import sys

from absl import app
from absl import flags
import jax

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import policy as policy_lib
from rlhf_jax import runtime

_MODEL = flags.DEFINE_string('model', None, "Hugging Face folder, or a run's working directory.")
_PROMPT = flags.DEFINE_multi_string('prompt', [''], 'What to continue; may be given repeatedly.')
_DATA = flags.DEFINE_string(
  'data', None, 'Or a data set, whose prompts are read as in training, by the chat template.'
)
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest token.', 0.0)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample among the k likeliest tokens; 0: all.', 0)
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample within this probability mass.', 0.0, 1.0)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', None, 'Length limit; by default 128, or what the context leaves.', 1
)
_IGNORE_EOS = flags.DEFINE_bool('ignore_eos', False, 'Go on past the end of the text.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Samples of each prompt.', 1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the samples.')


def main(argv):
  """Prints prompt and response, samples parted by a line."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  if _DATA.value and _PROMPT.present:
    sys.exit('error: --prompt and --data: give one of them')
  with command_line.one_line():
    runtime.configure()
    policy = policy_lib.TextPolicy.load(_MODEL.value)
    prompts = policy.read_prompts(_DATA.value) if _DATA.value else _PROMPT.value
    samples = policy.sample(
      prompts,
      jax.random.key(_SEED.value),
      max_new_tokens=_MAX_NEW_TOKENS.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      ignore_eos=_IGNORE_EOS.value,
      samples=_NUM_SAMPLES.value,
    )
    text = '\n---\n'.join(p + r for p, r in zip(samples.prompts, samples.responses))
    print(errors.printable(text) if sys.stdout.isatty() else text)


if __name__ == '__main__':
  app.run(main, flags_parser=functools.partial(command_line.parse, required=('model',)))
