"""rlhf merge --model=FOLDER --adapter=FOLDER:WEIGHT [--adapter=FOLDER:WEIGHT ...] --output=FOLDER

Adds the weighted sum of LoRA adapters of one base model to its weights. The adapters are PEFT
folders, or folders of runs that trained one. Writes the model to OUTPUT/model, and to
OUTPUT/adapter one adapter that does the same.

python -m rlhf_jax.merge does the same.
"""

import math
import pathlib

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import experts
from rlhf_jax import policy as policy_lib
from rlhf_jax import runtime


def parse_adapter(text):
  """Returns (folder, weight) of a value of --adapter.

  Raises:
    UserError: It has another form.
  """
  path, _, weight = text.rpartition(':')
  try:
    number = float(weight)
  except ValueError:
    number = math.nan
  errors.need(
    path and math.isfinite(number),
    f'--adapter={text} must have the form FOLDER:WEIGHT, such as runs/law:0.5',
  )
  return path, number


def start():
  """Reads the command line and writes the merged model."""
  parser = command_line.Arguments('rlhf merge', __doc__)
  parser.add_argument('--model', required=True, help='folder of the base model')
  parser.add_argument('--adapter', required=True, action='append', help='FOLDER:WEIGHT')
  parser.add_argument('--output', required=True, help='folder to write')
  options = parser.parse_args()
  with command_line.exit_on_error():
    adapters = [parse_adapter(text) for text in options.adapter]
    output = pathlib.Path(options.output)
    runtime.configure()
    base = policy_lib.TextPolicy.load(options.model)
    experts.save(output, base, adapters)
    print(f'model: {output / "model"}; adapter: {output / "adapter"}')


if __name__ == '__main__':
  start()
