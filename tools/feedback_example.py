"""A made-up project of the labelling page: prompts, answers of four policies, and votes."""

import itertools
import random

NAME = 'helpful'
INSTRUCTIONS = """Choose the answer that you would rather get yourself.

1. Read the question first, then both answers to the end.
2. An answer that is wrong or unsafe is worse than one that is short.
3. Of two good answers, the one that is easier to follow wins. Length alone does not count.
4. Call it a tie if you cannot decide in a minute, and skip what you do not understand.

Flag texts that should not be in the data, such as names and addresses of people."""
POLICIES = ('pretrained', 'sft', 'ppo-1', 'ppo-2')  # from worst to best
PEOPLE = {'Amina': 0.93, 'Jonas': 0.88, 'Mei': 0.9, 'Rafael': 0.7}  # how often each is right
SIMULATED = 'simulated-1'
# A prompt, then an answer of each policy.
EXAMPLES = (
  (
    'How do I get a red wine stain out of a cotton shirt?',
    'Red wine is made from grapes. Cotton shirts are made from cotton. A stain is a mark.',
    'Wash it. Use cold water and soap, then wash it again if the stain is still there.',
    'Blot it with a towel, rinse it with cold water, and wash it with detergent as usual.',
    'Blot the stain, do not rub it. Pour salt or soda water over it and wait ten minutes. Rinse '
    'with cold water, dab on liquid detergent, and wash it cold. Check that the mark has gone '
    'before you use a dryer: heat sets it.',
  ),
  (
    'Explain to a ten-year-old why the sky is blue.',
    'The sky is blue because the sky is blue in the day and the sky is dark in the night.',
    'Air scatters light of short wavelengths more strongly, so that blue light reaches the eye.',
    'Sunlight has all the colours in it. Air throws the blue part around more than the rest, so '
    'blue comes at you from everywhere.',
    'Sunlight looks white, but it is all the colours of a rainbow mixed. When it flies through the '
    'air it bumps into tiny bits of air. Blue bounces around the most, so whichever way you look, '
    'some blue is coming towards you.',
  ),
  (
    'My sourdough does not rise. What should I check?',
    'Check the dough. Check the oven. Check the flour. Check the dough.',
    'Your starter may be too old. Buy yeast.',
    'Check that the starter doubles after you feed it, and leave the dough somewhere warmer.',
    'Two things explain most flat loaves. First the starter: fed, it should double in 4 to 8 '
    'hours, and a spoonful should float in water. Then warmth: at 20 °C the dough may need 12 '
    'hours, at 26 °C half of that.',
  ),
  (
    'Write a polite message to a neighbour whose dog barks at night.',
    'Dear neighbour, your dog is too loud. Make it stop or I will call someone.',
    'Hello, your dog barks at night. Please do something about it. Thank you.',
    'Hi! I wanted to let you know that your dog barks a lot after eleven. Could you have a look? '
    'Thanks!',
    'Hi Sam, I hope you are well! You may not hear it from your side, but Bo has been barking '
    'around 2 a.m. this week and I am short of sleep. Is there anything we could try together? '
    'Happy to talk it over with a coffee.',
  ),
  (
    'What is the difference between weather and climate?',
    'Weather is weather. Climate is when there is climate over a place.',
    'Weather is today and climate is long.',
    'Weather is what happens today; climate is what is usual over about thirty years.',
    'Weather is what you see out of the window today. Climate is what you should expect: the '
    'average, and the extremes, of a place over thirty years or so. One cold day says little '
    'about the climate.',
  ),
  (
    'ما هي أفضل طريقة لتعلم لغة جديدة؟',
    'اللغة هي لغة جديدة واللغة القديمة هي لغة.',
    'اقرأ كثيرا.',
    'تعلم القليل كل يوم، واستمع إلى اللغة وتحدث بها منذ البداية.',
    'تعلم ربع ساعة كل يوم بدلا من ساعتين يوم السبت. ابدأ بالكلمات الأكثر شيوعا، واستمع إلى نصوص '
    'سهلة، وتحدث من الأسبوع الأول حتى لو أخطأت.',
  ),
  (
    'Is it safe to eat rice that stood on the stove overnight?',
    'Rice is eaten by many people. Yes.',
    'Yes, if you heat it well.',
    'Better not. Bacteria may have grown, and heating does not remove all they leave behind.',
    'Better throw it away. Spores of Bacillus cereus survive the cooking, grow in warm rice, and '
    'leave a toxin that heating again does not destroy. Next time put it into the fridge within '
    'an hour.',
  ),
  (
    'Give me three names for a small bakery by the sea.',
    'Bakery, Bakery by the sea, Small bakery.',
    'The Sea Bakery, Bread Shop, Good Bread.',
    'Salt & Crumb, The Harbour Loaf, Tide Bakery.',
    'Salt & Crumb, because it is both; The Early Tide, for those who come at six; and Driftloaf, '
    'which is easy to remember.',
  ),
)
REASONS = (
  'It says what to check and why.',
  'The other one is not true.',
  'Shorter, and I would know what to do.',
  'Both are fine; this one is kinder.',
)


FLAGS = {6: ('false',), 11: ('broken',)}  # of the judgements with these numbers
ROUNDS = 3  # in round r, policies 0 to r + 1 are compared


def fill(store):
  """Adds the project to an empty store, with three rounds of judgements by people.

  Args:
    store: Store.

  Returns:
    The project.
  """
  project = store.add_project(NAME, instructions=INSTRUCTIONS, overlap=3, repeat_fraction=0.1)
  voters = [(store.add_annotator(name)[0], right) for name, right in PEOPLE.items()]
  voters.append((store.add_annotator(SIMULATED, simulated=True)[0], 0.8))
  for round in range(ROUNDS):
    pairs = list(itertools.combinations(range(round + 2), 2))
    tasks = []
    for number, row in enumerate(EXAMPLES * 2):
      pair = pairs[number % len(pairs)]
      tasks.append(_task(row, 'pair', pair[:: -1 if number % 3 else 1], round))
    store.add_tasks(project, tasks)
  store.add_tasks(project, [_task(row, 'rank', range(4), 2) for row in EXAMPLES[:4]])
  store.add_tasks(project, [_task(row, 'rate', (3,), 2) for row in EXAMPLES[4:]])
  rng = random.Random(0)
  for number in range(150):
    annotator, right = voters[number % len(voters)]
    assignment = store.next_task(project, annotator)
    if assignment is not None:
      _judge(store, assignment, annotator, rng, right, number)
  return project


def add_own(store, project, annotator):
  """Gives one annotator a task of each kind, in this order: pair, rank, best, rate, pair."""
  for number, (kind, row) in enumerate(zip(('pair', 'rank', 'best', 'rate', 'pair'), EXAMPLES)):
    row = EXAMPLES[5] if number == 4 else row  # right to left
    prompt = store.add_prompt(project, row[0])
    policies = {'rank': (0, 1, 3), 'best': range(4), 'rate': (2,)}.get(kind, (2, 3))
    completions = [store.add_completion(prompt, row[1 + i], policy=POLICIES[i]) for i in policies]
    store.add_task(
      project, kind, prompt, completions, annotator=annotator, priority=9 - number, round=2
    )


def _task(row, kind, policies, round):
  texts = [{'text': row[1 + i], 'policy': POLICIES[i]} for i in policies]
  return {'prompt': row[0], 'completions': texts, 'kind': kind, 'round': round}


def _judge(store, assignment, annotator, rng, right, number):
  """Answers as a person would who prefers the better policy with probability `right`."""
  ids = [completion.id for completion in assignment.shown]
  quality = [POLICIES.index(completion.policy) for completion in assignment.shown]
  noisy = [value if rng.random() < right else 3 * rng.random() for value in quality]
  order = sorted(range(len(ids)), key=lambda i: -noisy[i])
  if assignment.task.kind == 'pair':
    answer = {'chosen': ids[order[0]], 'strength': rng.randint(1, 4)}
    if rng.random() < 0.1:
      answer = {'tie': True}
  elif assignment.task.kind == 'rank':
    answer = {'ranking': [[ids[i]] for i in order]}
  else:
    answer = {'rating': {str(i): 3 + value for i, value in zip(ids, quality)}}
  store.judge(
    assignment,
    annotator,
    {'skip': True} if number % 37 == 36 else answer,
    reason=REASONS[number % len(REASONS)] if number % 5 == 0 else '',
    flags=FLAGS.get(number % 40, ()),
    seconds=rng.lognormvariate(2.7, 0.5),
    token=assignment.token,
  )
