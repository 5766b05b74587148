"""Chat with two live policies in Chromium: streamed answers, choices, keys."""

import checks
import pytest
import served

WAIT = 240_000  # milliseconds: the policies are loaded and compiled at the first message


@pytest.fixture(scope='module')
def world(tmp_path_factory, policy_folders):
  """Yields a server with two live policies."""
  folder = tmp_path_factory.mktemp('chat')
  with served.serve(folder, policies=[str(path) for path in policy_folders]) as page:
    yield page


def start(world, visit, name, button, **options):
  """Opens a new dialogue of a new annotator."""
  world.add_annotator(name)
  page = visit(world.origin, **options)
  served.sign_in(page, world.links[name])
  page.get_by_role('link', name='Chat').click()
  page.get_by_role('button', name=button).click()
  page.locator('#message').wait_for()
  return page


def say(page, text):
  """Sends a message by keys, and waits for both answers; returns them in the order of the page."""
  page.locator('#message:focus').wait_for()
  page.keyboard.type(text)
  page.keyboard.press('Enter')
  page.locator('.scale').wait_for(timeout=WAIT)
  return plain(page.locator('.answer .text'))


def turns(page):
  """Returns the texts of the conversation."""
  return plain(page.locator('.prompt .turn .text'))


def plain(texts):
  """Returns the texts of a locator, '' for what stands in the place of an empty answer."""
  return ['' if 'empty' in text else text for text in texts.all_inner_texts()]


def test_a_dialogue_of_two_turns_by_keyboard(world, visit):
  page = start(world, visit, 'speaker', 'Start a helpful dialogue')
  checks.accessible(page)
  page.evaluate("""() => {
    window.pieces = 0;
    new MutationObserver(changes => {
      for (const change of changes) {
        if (change.target.matches && change.target.matches('[aria-busy] .text')) window.pieces += 1;
      }
    }).observe(document.querySelector('#main'), {childList: true, subtree: true});
  }""")
  texts = say(page, 'w1 w2')
  words = sum(len(text.split()) for text in texts)
  assert page.evaluate('window.pieces') >= words / 16  # in pieces, not all at once
  assert page.url.startswith(f'{world.origin}/chat')
  checks.accessible(page)
  page.keyboard.press('ArrowRight')
  page.keyboard.press('3')
  page.locator('#message').wait_for()
  assert turns(page) == ['w1 w2', texts[1]]
  texts = say(page, 'w3')
  page.reload()  # nothing is lost
  assert plain(page.locator('.answer .text')) == texts
  page.keyboard.press('ArrowLeft')
  page.keyboard.press('1')
  page.locator('#message').wait_for()
  assert turns(page)[2:] == ['w3', texts[0]]
  first, second = world.judgements('speaker')
  assert first.answer['strength'] == 3
  assert second.answer == {'chosen': second.shown[0], 'strength': 1}
  names = {
    completion.policy
    for row in world.store.judgements(world.project)
    for completion in row.task.completions
  }
  assert not any(name in page.content() for name in names)  # blind
  assert len(names) == 2


def test_an_attack_is_rated_at_the_end(world, visit):
  page = start(world, visit, 'attacker', 'Start an attack', viewport={'width': 360, 'height': 740})
  say(page, 'w5')
  checks.fits(page)
  page.get_by_role('button', name='A is much').click()
  page.locator('#message').wait_for()
  page.get_by_role('button', name='End and rate').click()
  page.locator('.rating').wait_for()
  checks.fits(page)
  page.keyboard.press('5')
  page.get_by_role('link', name='Start another').wait_for()
  pair, rating = world.judgements('attacker')
  assert pair.answer['strength'] == 4
  assert list(rating.answer['rating'].values()) == [5]


def test_messages_are_text(world, visit):
  page = start(world, visit, 'injector', 'Start a helpful dialogue')
  message = '<img src=/stolen onerror=ran() data-injected>{{7*191}}'
  say(page, message)
  checks.clean(page)
  assert turns(page) == [message]
  page.goto('/chat')
  checks.clean(page)
  checks.accessible(page)
