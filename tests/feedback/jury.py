"""A project with few judgements, whose statistics are worked out by hand in the tests.

Ada and Bo are people, Robo is simulated; all three judge every task. Completion A is the first of
a task. Answers, in the order Ada, Bo, Robo:

  | task | round | kind | completions     | answers                                              |
  |------|-------|------|-----------------|------------------------------------------------------|
  | 0    | 0     | pair | sft, ppo        | B 2         B 4         B 1                          |
  | 1    | 0     | pair | sft, ppo        | B 1         B 2         A 1                          |
  | 2    | 0     | pair | sft, ppo        | A 3         B 1         A 2                          |
  | 3    | 0     | pair | sft, ppo        | tie         tie         tie                          |
  | 4    | 1     | rank | sft, ppo, ppo2  | C > B > A   C > A = B   C > B > A                    |
  | 5    | 1     | rate | ppo2            | 6           5           2                            |
  | 6    | 1     | pair | ppo, ppo2       | skip        B 2         skip                         |

Ada also answers two gold questions, one right, and repeats tasks 0, the same, and 1, not the same.
"""

from rlhf_jax.feedback import questions
from rlhf_jax.feedback import reading

ANSWERS = (
  (('B', 2), ('B', 4), ('B', 1)),
  (('B', 1), ('B', 2), ('A', 1)),
  (('A', 3), ('B', 1), ('A', 2)),
  ('tie', 'tie', 'tie'),
  ('C>B>A', 'C>A=B', 'C>B>A'),
  (6, 5, 2),
  ('skip', ('B', 2), 'skip'),
)
ROWS = (
  *((0, 'pair', ('sft', 'ppo')),) * 4,
  (1, 'rank', ('sft', 'ppo', 'ppo2')),
  (1, 'rate', ('ppo2',)),
  (1, 'pair', ('ppo', 'ppo2')),
)
SECONDS = (2, 4, 9)  # of every answer of Ada, Bo and Robo
REASON, FLAG = 'Ada: B names the city', 'factual error'


def answer_of(task, vote):
  """Returns the answer that a vote of ANSWERS means."""
  letter = {chr(ord('A') + i): completion.id for i, completion in enumerate(task.completions)}
  if vote in ('skip', 'tie'):
    return {vote: True}
  if isinstance(vote, tuple):
    return {'chosen': letter[vote[0]], 'strength': vote[1]}
  if isinstance(vote, int):
    return {'rating': {str(task.completions[0].id): vote}}
  return {'ranking': [[letter[name] for name in group.split('=')] for group in vote.split('>')]}


def fill(store):
  """Adds the project to a store, and returns it."""
  project = store.add_project('capitals', instructions='Which answer is better?', overlap=3)
  tasks = store.add_tasks(
    project,
    [
      {
        'prompt': f'Question {number}?',
        'kind': kind,
        'round': round,
        'completions': [
          {'text': f' Answer of {policy} to {number}' + i * ' indeed', 'policy': policy}
          for i, policy in enumerate(policies)
        ],
      }
      for number, (round, kind, policies) in enumerate(ROWS)
    ],
  )
  people = [
    store.add_annotator(name, simulated=name == 'Robo')[0] for name in ('Ada', 'Bo', 'Robo')
  ]
  number = {task.id: i for i, task in enumerate(tasks)}
  for who, (person, seconds) in enumerate(zip(people, SECONDS, strict=True)):
    while assignment := store.next_task(project, person):
      i = number[assignment.task.id]
      store.judge(
        assignment,
        person,
        answer_of(assignment.task, ANSWERS[i][who]),
        reason=REASON if (i, who) == (1, 0) else '',
        flags=[FLAG] if (i, who) in ((1, 0), (4, 1)) else [],
        seconds=seconds,
        token=assignment.token,
      )
  _check_ada(store, project, people[0], tasks)
  return project


def _repeat(store, project, ada, task):
  """Adds the task that repeats one for Ada; the store itself adds some at random."""
  options = questions.Options(overlap=1, annotator_id=ada.id, repeats_task_id=task.id)
  with store.database.write(project.id) as session:
    row = questions.add_task(session, project, 'pair', task.prompt.id, task.completions, options)
    return reading.tasks(session, [row])[0]


def _check_ada(store, project, ada, tasks):
  """Lets Ada answer gold questions and repeats."""
  prompt = store.add_prompt(project, 'Gold?')
  both = [store.add_completion(prompt, f' Gold {i}.', policy='gold') for i in range(2)]
  gold = {'chosen': both[0].id}
  first = [
    store.add_task(project, 'pair', prompt, both, gold=gold, annotator=ada) for _ in range(2)
  ]
  again = [_repeat(store, project, ada, task) for task in tasks[:2]]
  for task, vote in zip([*first, *again], (('A', 1), ('B', 1), ('B', 3), ('A', 1)), strict=True):
    lease = store.lease(project, task, ada)
    store.judge(lease, ada, answer_of(task, vote), seconds=SECONDS[0], token=lease.token)
