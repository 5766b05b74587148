"""Distillation of your teacher into your student, on the student's own responses to your prompts.

rlhf run --config=distillation --workdir=DIR --config.model.path=STUDENT \\
    --config.distillation.teacher=TEACHER --config.data.path=FILE

Student and teacher need the same tokenizer. For context distillation, leave out the teacher and
pass `--config.distillation.context='A text, or the path of a file.'`. Presets: gkd (half of the
responses are completions of the data), offline (all are); see rlhf_jax/algorithms/distillation.py.
Watch `distillation/reverse_kl`; samples.jsonl has responses. configs/smaller_student.py and
configs/context_distillation.py are whole pipelines.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import distillation


def get_config(arg=None):
  """Returns the config. Arguments: debug (2 steps), seed, preset."""
  arg = c.parse_arg(arg, debug=False, seed=0, preset='')
  config = distillation.config(arg.preset)
  config.seed = arg.seed
  if config.distillation.student_fraction > 0:
    config.data.update({'max_prompt_length': 256, 'on_long': 'truncate_left'})
    config.sampling.max_new_tokens = 256
    config.samples_every = 20
  if config.distillation.student_fraction < 1:
    config.data.max_length = 512
  config.batch_size, config.steps = 64, 500
  config.optim.update({'schedule': 'linear', 'warmup_steps': 10, 'clip_norm': 1.0})
  config.checkpoint_every = 50
  if arg.debug:
    config.update({'steps': 2, 'batch_size': 4})
    config.optim.warmup_steps = 0
  return config
