"""Dialogues in the store: whose turn it is, what continues them, and what is stored."""

import pytest
import sqlalchemy as sa

from rlhf_jax import errors
from rlhf_jax.feedback import accounts
from rlhf_jax.feedback import dialogues
from rlhf_jax.feedback import judging
from rlhf_jax.feedback import overview
from rlhf_jax.feedback import store as store_lib


class Chat:
  """A store with one annotator, and a dialogue."""

  def __init__(self, folder, mode):
    self.store = store_lib.Store.open(folder / 'feedback.db')
    self.project = self.store.add_project('p')
    self.ann, _ = self.store.add_annotator('ann')
    self.dialogue = accounts.add_dialogue(self.store.database, self.project, self.ann, mode)

  def state(self):
    """Returns the state, read as a new browser does."""
    found = dialogues.find(self.store, self.project, self.ann, self.dialogue.id)
    return dialogues.state(self.store, found)

  def say(self, text):
    """Adds a message, and returns its prompt."""
    dialogues.say(self.store, self.project, self.dialogue, text)
    return self.state().prompt

  def answer(self, prompt, left, right):
    """Adds two answers."""
    answers = [dialogues.Answered(left, 'x', 'run/1', {'seed': 4})]
    answers.append(dialogues.Answered(right, 'y', None, None))
    dialogues.add_answers(self.store, self.project, self.ann, prompt, answers)

  def judge(self, **answer):
    """Judges the open task; `text` names the completion that is chosen."""
    assignment = self.store.lease(self.project, self.state().task, self.ann)
    text = answer.pop('text', None)
    if text is not None:
      answer['chosen'] = next(c.id for c in assignment.shown if c.text == text)
    form = judging.Form(
      answer=answer, reason='why', flags=('harmful',), seconds=2.0, token=assignment.token
    )
    dialogues.judge(self.store, self.dialogue, self.ann, assignment, form)

  def end(self):
    """Ends the dialogue."""
    dialogues.end(self.store, self.project, self.dialogue, self.ann)


@pytest.fixture
def chat(tmp_path, request):
  """A dialogue of the mode that the test names by `request.param`; 'helpful' by default."""
  made = Chat(tmp_path, getattr(request, 'param', 'helpful'))
  yield made
  made.store.close()


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


def contents(messages):
  return [message['content'] for message in messages]


def test_the_better_answer_continues_the_dialogue(chat):
  assert chat.state() == dialogues.State('write', [], None, None, None, 0)
  chat.answer(chat.say(' one\r\ntwo '), ' left ', 'right')
  state = chat.state()
  assert (state.step, state.messages) == ('choose', [user('one\ntwo')])
  assert chat.store.progress(chat.project).wanted == 0
  chat.judge(text=' left ', strength=2)
  assert chat.store.progress(chat.project).wanted == 1
  state = chat.state()
  assert (state.step, state.turns) == ('write', 1)
  assert state.messages == [user('one\ntwo'), assistant('left')]
  prompt = chat.say('three')
  assert prompt.messages == [user('one\ntwo'), assistant('left'), user('three')]
  chat.answer(prompt, 'a', 'b')
  chat.judge(text='b', strength=4)
  chat.end()
  state = chat.state()
  assert (state.step, state.turns) == ('closed', 2)
  assert contents(state.messages) == ['one\ntwo', 'left', 'three', 'b']
  records = chat.store.records(chat.project)
  assert [(r['chosen'], r['rejected']) for r in records] == [(' left ', 'right'), ('b', 'a')]
  assert records[1]['prompt'] == prompt.messages
  first = chat.store.tasks(chat.project)[0].completions
  made_by = {c.text: (c.policy, c.checkpoint, c.sampling) for c in first}
  assert made_by == {' left ': ('x', 'run/1', {'seed': 4}), 'right': ('y', None, None)}
  (one, _) = chat.store.judgements(chat.project)
  assert (one.reason, one.flags, one.seconds) == ('why', ['harmful'], 2.0)


@pytest.mark.parametrize('chat', ['red_team'], indirect=True)
def test_the_more_harmful_answer_continues_an_attack_and_is_rejected(chat):
  chat.answer(chat.say('attack'), 'mild', 'vile')
  chat.judge(text='vile', strength=3)
  assert contents(chat.state().messages) == ['attack', 'vile']
  [record] = chat.store.records(chat.project)
  assert (record['chosen'], record['rejected']) == ('mild', 'vile')
  chat.say('not answered')
  chat.end()
  state = chat.state()
  assert (state.step, contents(state.messages)) == ('rate', ['attack', 'vile'])
  chat.end()  # again, in another window
  [completion] = chat.state().task.completions
  assert completion.text == 'vile'
  chat.judge(rating={str(completion.id): 6})
  assert chat.state().step == 'closed'
  found = chat.store.judgements(chat.project)
  assert [item.task.kind for item in found] == ['pair', 'rate']
  assert found[1].answer == {'rating': {str(completion.id): 6}}
  # Its best rating is the most harmful answer, so nothing may learn from it.
  assert chat.store.records(chat.project, form='ratings') == []
  assert len(chat.store.records(chat.project, form='rankings')) == 1  # of the pair


@pytest.mark.parametrize('chat', ['red_team'], indirect=True)
def test_an_attack_without_answers_has_nothing_to_rate(chat):
  chat.say('attack')
  chat.end()
  assert chat.state().step == 'closed'


def test_after_a_tie_one_of_the_two_continues(chat):
  """The first in canonical order: over several turns it is the one or the other."""
  taken = set()
  for turn in range(12):
    chat.answer(chat.say(f'turn {turn}'), 'left', 'right')
    chat.judge(tie=True)
    taken.add(chat.state().messages[-1]['content'])
  assert taken == {'left', 'right'} and chat.state().turns == 12


def test_answers_are_displayed_on_the_side_where_they_were_streamed(chat):
  for turn in range(8):
    chat.answer(chat.say(f'turn {turn}'), f'left {turn}', f'right {turn}')
    for _ in range(2):  # also when the page is loaded again
      shown = chat.store.lease(chat.project, chat.state().task, chat.ann).shown
      assert [c.text for c in shown] == [f'left {turn}', f'right {turn}']
    chat.judge(text=f'left {turn}', strength=1)


def test_an_unanswered_message_is_replaced(chat):
  old = chat.say('first')
  new = chat.say('second')
  assert (contents(new.messages), chat.state().step) == (['second'], 'answer')
  chat.answer(old, 'a', 'b')  # a stream of another window, which began before
  assert chat.state().step == 'answer' and not chat.store.tasks(chat.project)
  chat.answer(new, 'a', 'b')
  chat.answer(new, 'c', 'd')
  [task] = chat.store.tasks(chat.project)
  assert {c.text for c in task.completions} == {'a', 'b'}


def test_a_message_can_be_changed_back(chat):
  first = chat.say('first')
  assert chat.say('first') == first  # a form that is sent twice
  chat.say('second')
  again = chat.say('first')
  assert contents(again.messages) == ['first'] and again.id != first.id
  chat.answer(again, 'a', 'b')
  assert (chat.state().step, contents(chat.state().messages)) == ('choose', ['first'])


def test_a_message_needs_one_connection(chat):
  """A second one may have to wait for the writes that wait for the message."""
  held, most = 0, 0

  def take(*_):
    nonlocal held, most
    held += 1
    most = max(most, held)

  def give(*_):
    nonlocal held
    held -= 1

  sa.event.listen(chat.store.database.engine, 'checkout', take)
  sa.event.listen(chat.store.database.engine, 'checkin', give)
  chat.say('first')
  assert (held, most) == (0, 1)


def test_answers_that_come_after_the_end_are_dropped(chat):
  prompt = chat.say('first')
  chat.end()
  chat.answer(prompt, 'a', 'b')
  assert chat.state().step == 'closed' and not chat.store.tasks(chat.project)


def test_a_choice_that_is_open_at_the_end_is_skipped(chat):
  chat.answer(chat.say('first'), 'a', 'b')
  chat.end()
  assert [item.answer for item in chat.store.judgements(chat.project)] == [{'skip': True}]
  assert chat.state().step == 'closed' and not chat.state().messages
  progress = chat.store.progress(chat.project)  # nobody will choose any more
  assert (progress.tasks, progress.wanted, progress.skipped) == (0, 0, 0)
  assert overview.progress(chat.store.database, chat.project) == []


def test_messages_that_cannot_be_sent(chat):
  for text, message in (
    (' \n', 'empty'),
    ('x' * 20_001, 'more than 20000 characters'),
    ('a\0b', 'NUL'),
  ):
    with pytest.raises(errors.UserError, match=message):
      chat.say(text)
  assert chat.state().step == 'write'
  chat.answer(chat.say('first'), 'a\0', 'b')  # a model may write one
  assert {c.text for c in chat.state().task.completions} == {'a\ufffd', 'b'}
  with pytest.raises(errors.UserError, match='first choose'):
    chat.say('second')
  chat.end()
  with pytest.raises(errors.UserError, match='has ended'):
    chat.say('second')


def test_only_the_annotator_finds_a_dialogue(chat):
  ben, _ = chat.store.add_annotator('ben')
  chat.say('mine')
  assert dialogues.find(chat.store, chat.project, ben, chat.dialogue.id) is None
  assert not dialogues.openings(chat.store, chat.project, ben)
  other = accounts.add_dialogue(chat.store.database, chat.project, chat.ann, 'red_team')
  found = dialogues.openings(chat.store, chat.project, chat.ann)
  assert [(d.id, text) for d, text in found] == [(other.id, ''), (chat.dialogue.id, 'mine')]
  assert dialogues.find(chat.store, chat.project, chat.ann, 10**30) is None
  elsewhere = chat.store.add_project('other')
  assert dialogues.find(chat.store, elsewhere, chat.ann, chat.dialogue.id) is None
