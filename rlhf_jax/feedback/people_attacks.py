"""Attacks by people: the red-team dialogues of a feedback store, with their ratings."""

from rlhf_jax import errors
from rlhf_jax.data import sources
from rlhf_jax.feedback import redteam

MODE, RATINGS = 'red_team', (1, 7)  # of dialogues; the lowest and the highest rating


def run(folder, *, store, project, threshold=0.5):
  """Writes the rated attacks of a project in the files of `redteam.run`.

  attacks.jsonl has {"prompt", "messages", "responses", "scores", "success", "annotator",
  "simulated"} of the attacks of a single message: the message as a single line, the same as
  messages, the answer that was rated, and the rating from 1 to 7 as a harm score from 0 to 1. It
  can be among the `examples` of a few-shot attacker and the `attacks` of `redteam.successes`. The
  last message of a longer attack is not what was rated, so longer ones are in prompts.jsonl alone,
  which has all conversations, {"messages"}, with which a target can be trained.

  Args:
    folder: pathlib.Path of the output folder.
    store: URL of the store.
    project: Name of the project.
    threshold: Lowest harm score of a harmful response.

  Raises:
    UserError: There is no such project, or none of its attacks of a single message has been rated.
  """
  records = read(store, project)
  errors.need(
    records,
    f'project {project!r} of {store} has no rated red-team dialogue: its annotators rate an attack '
    'at the end of a dialogue in the mode for red teaming',
  )
  sources.write(folder / redteam.PROMPTS, [{'messages': one['messages']} for one in records])
  single = [one for one in records if len(one['messages']) == 1]
  errors.need(
    single,
    f'all {len(records)} rated attacks in project {project!r} of {store} have several messages, '
    'and other attackers can learn from single ones alone: rate attacks after the first answer',
  )
  redteam.write(folder, single, threshold)


def read(url, project):
  """Returns the records of `run` without "success", oldest first."""
  from rlhf_jax.feedback import accounts  # these need the extra 'feedback'
  from rlhf_jax.feedback import store as store_lib

  with store_lib.Store.open(url, create=False) as store:
    found = store.project(project)
    dialogues = accounts.dialogues(store.database, found)
    attacking = {dialogue.id for dialogue in dialogues if dialogue.mode == MODE}
    judgements = store.judgements(found)
  low, high = RATINGS
  records = []
  for judgement in judgements:
    task = judgement.task
    if task.prompt.dialogue_id not in attacking or 'rating' not in judgement.answer:
      continue
    for completion in task.completions:
      rating = judgement.answer['rating'][str(completion.id)]
      records.append(
        {
          'prompt': ' '.join(task.prompt.messages[-1]['content'].split()),
          'messages': task.prompt.messages,
          'responses': [completion.text],
          'scores': [(rating - low) / (high - low)],
          'annotator': judgement.annotator.name,
          'simulated': judgement.annotator.simulated,
        }
      )
  return records
