"""On-policy distillation of the quickstart's policy into a student of half its width.

rlhf run --config=smaller_student --workdir=/tmp/student
rlhf run --config=smaller_student --workdir=/tmp/quickstart --fork=/tmp/student
rlhf run --config=smaller_student:debug --workdir=/tmp/debug

The teacher is the policy that the quickstart trains by PPO; the second command takes it from a
finished quickstart. The student is pretrained and fine-tuned as the teacher was. Then it answers
the prompts, and at each token of its own answers it learns the teacher's distribution (GKD, Agarwal
et al. 2023, https://arxiv.org/abs/2306.13649). It needs no reward.

Measured, seeds 0, 1 and 2: gold score of the student from -0.84, -0.86 and -0.85 to 1.64, 1.92 and
1.74 (standard error 0.05); its teacher has 1.70, 1.86 and 1.76, and had 0.10, 0.21 and 0.14 before
PPO. Four minutes on one CPU core.
"""

import quickstart

from rlhf_jax import config as c
from rlhf_jax.algorithms import distillation as distillation_lib


def get_config(arg=None):
  """Returns the config. Arguments: debug (seconds), seed, width (of the student), loss."""
  arg = c.parse_arg(arg, debug=False, seed=0, width=64, loss='reverse_kl')
  config, student = (quickstart.get_config(f'seed={arg.seed},debug={arg.debug}') for _ in range(2))
  config.pretrain_student, config.sft_student = student.pretrain, student.sft
  config.pretrain_student.model.init.update(
    {'hidden_size': arg.width, 'intermediate_size': 3 * arg.width}
  )
  config.sft_student.model.path = '$workdir/pretrain_student/model'
  config.distill = distill(arg.loss)
  config.stages = (*config.stages[:-1], 'pretrain_student', 'sft_student', 'distill', 'evaluate')
  config.evaluate.update(
    {
      'title': 'A student of half the width',
      'summary': 'Gold is the hidden score. The student learned from the PPO policy alone.',
      'policies': (
        ('sft', '$workdir/sft'),
        ('ppo', '$workdir/ppo'),
        ('sft_student', '$workdir/sft_student'),
        ('distill', '$workdir/distill'),
      ),
      'baseline': 'sft_student',
      'trained': 'distill',
      'best_of': 0,
      'curves': ('pretrain_student', 'sft_student', 'distill'),
    }
  )
  if arg.debug:
    config.distill.update({'steps': 2, 'batch_size': 16})
    config.distill.optim.warmup_steps = 0
    config.distill.sampling.max_new_tokens = 12
  return config


def distill(loss):
  """Returns the distillation stage."""
  stage = quickstart.base(distillation_lib.config(), '$workdir/sft_student/model')
  stage.data.update({'path': '$workdir/world/prompts.jsonl', 'max_prompt_length': 12})
  stage.distillation.update({'teacher': '$workdir/ppo/model', 'loss': loss})
  stage.sampling.max_new_tokens = 36
  stage.batch_size, stage.steps = 64, 200
  stage.optim.update({'learning_rate': 2e-3, 'schedule': 'linear', 'warmup_steps': 10})
  stage.samples_every = 50
  return stage
