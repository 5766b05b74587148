"""rlhf generate --model=FOLDER --prompt="..." [--prompt=@FILE ...]
rlhf generate --model=FOLDER --data=FILE
rlhf generate --model=FOLDER --expert=ADAPTER:DATA --expert=ADAPTER:DATA --prompt="..."

Samples text from a Hugging Face folder, a finished run, or the newest checkpoint of an unfinished
run. In a prompt \\n is a line break, \\t a tab and \\\\ a backslash. @FILE reads the prompt from a
file, without escapes; a line break at its end is removed.

With experts, each prompt is answered by the model with the adapter whose DATA, the data set that it
was trained on, has the prompts that are nearest to it. The adapter's folder is printed on stderr.

python -m rlhf_jax.generate does the same.
"""

import pathlib
import re
import sys

from absl import flags
import jax
import numpy as np

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import experts
from rlhf_jax import policy as policy_lib
from rlhf_jax import runtime

_MODEL = flags.DEFINE_string('model', None, "Hugging Face folder, or a run's working directory.")
_PROMPT = flags.DEFINE_multi_string('prompt', [''], 'Text to continue, or @FILE to read it.')
_DATA = flags.DEFINE_string(
  'data', None, 'Data set of prompts in place of --prompt, read as in training (chat template).'
)
_EXPERT = flags.DEFINE_multi_string(
  'expert', [], 'ADAPTER:DATA of an expert; each prompt is answered by the one with nearest data.'
)
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 selects the most likely token.', 0.0)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample from the k most likely tokens; 0: from all.', 0)
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Sample from the most likely tokens with this total probability.', 0.0, 1.0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', None, 'Length limit; by default 128, or less if the context is shorter.', 1
)
_IGNORE_EOS = flags.DEFINE_bool('ignore_eos', False, 'Continue past the EOS token.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Responses to each prompt.', 1)
_BETA = flags.DEFINE_float(
  'beta', 0.0, 'Weight of the Q functions of a run of ilql; 0 samples from the policy alone.', 0.0
)
_SEED = flags.DEFINE_integer('seed', 0, 'Random seed of the samples.')
ESCAPED = {'n': '\n', 't': '\t', '\\': '\\'}


def main(argv):
  """Prints each prompt followed by its response, with --- between samples."""
  if len(argv) > 1:
    sys.exit(f'error: unexpected arguments {argv[1:]}: every option begins with --')
  if _DATA.value and _PROMPT.present:
    sys.exit('error: set only one of --prompt and --data')
  if _EXPERT.value and _BETA.value:
    sys.exit(
      'error: --beta needs the Q functions of one run, and --expert changes the model: use one of '
      'them'
    )
  with command_line.exit_on_error():
    texts = [prompt_of(text) for text in _PROMPT.value]
    runtime.configure()
    policy = policy_lib.TextPolicy.load(_MODEL.value, beta=_BETA.value)
    prompts = policy.read_prompts(_DATA.value) if _DATA.value else texts

    def sample(policy, prompts):
      return policy.sample(
        prompts,
        jax.random.key(_SEED.value),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        ignore_eos=_IGNORE_EOS.value,
        samples=_NUM_SAMPLES.value,
      ).responses

    if _EXPERT.value:
      responses = by_experts(policy, prompts, _EXPERT.value, sample)
    else:
      responses = sample(policy, prompts)
    repeated = [prompt for prompt in prompts for _ in range(_NUM_SAMPLES.value)]
    text = '\n---\n'.join(p + r for p, r in zip(repeated, responses, strict=True))
    print(errors.printable(text) if sys.stdout.isatty() else text)


def prompt_of(text):
  """Returns the prompt for a value of --prompt: text with escapes, or @FILE.

  Raises:
    UserError: If the file cannot be read.
  """
  if not text.startswith('@'):
    return re.sub(r'\\([nt\\])', lambda match: ESCAPED[match.group(1)], text)
  try:
    return pathlib.Path(text[1:]).read_text(encoding='utf-8').removesuffix('\n')
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'--prompt={text}: {text[1:]} cannot be read ({error}). Put a prompt that begins with @ into '
      'a file.'
    ) from error


def by_experts(policy, prompts, values, sample):
  """Samples responses from the expert whose training prompts are nearest to each prompt.

  Args:
    policy: TextPolicy of the base model.
    prompts: Texts.
    values: 'ADAPTER:DATA' of each expert.
    sample: Function (TextPolicy, prompts) -> responses, the same number for each prompt.

  Returns:
    Responses, in the order of the prompts.

  Raises:
    UserError: A value has another form, or an adapter or a data set cannot be read.
  """
  adapters, data = [], []
  for value in values:
    adapter, _, path = value.partition(':')
    errors.need(adapter and path, f'--expert={value} must have the form ADAPTER:DATA')
    adapters.append(adapter)
    data.append(policy.read_prompts(path))
  chosen, responses = experts.choose(prompts, data), {}
  for expert in np.unique(chosen):
    rows = np.flatnonzero(chosen == expert)
    merged = experts.merge(policy, [(adapters[expert], 1.0)])
    found = sample(merged, [prompts[row] for row in rows])
    responses |= dict(zip(rows, np.reshape(np.array(found, object), (len(rows), -1))))
  for row, expert in enumerate(chosen):
    print(f'{errors.brief(prompts[row], 60)!r}: expert {adapters[expert]}', file=sys.stderr)
  return [response for row in range(len(prompts)) for response in responses[row]]


def start():
  """Reads the command line and prints the samples."""
  command_line.start(main, required=('model',))


if __name__ == '__main__':
  start()
