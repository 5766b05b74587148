"""Annotators' pages in Chromium: the store must hold exactly what a person meant."""

import checks
import pytest
import served

ARROWS = {'A': 'ArrowLeft', 'B': 'ArrowRight'}
PAIRS = 20


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Yields a server and its store; each annotator has tasks that nobody else may do."""
  with served.serve(tmp_path_factory.mktemp('labelling')) as server:
    yield server


@pytest.fixture
def enter(world, visit):
  """Returns a function that signs an annotator in, with tasks of their own, and opens a page."""

  def enter_(name, kinds, **options):
    world.add_annotator(name)
    world.add_tasks(name, kinds)
    page = visit(world.origin, **options)
    served.sign_in(page, world.links[name])
    return page

  return enter_


def shown(page):
  """Returns the texts of the answers in the order of the page."""
  return page.locator('.answer .text').all_inner_texts()


def better(texts):
  """Returns the position of the text with the largest number, 'answer 3 of ...'."""
  return max(range(len(texts)), key=lambda i: int(texts[i].split()[1]))


def press(page, *keys):
  """Presses keys, the last of which saves the answer, and waits for the next page."""
  token = page.locator('#task [name=token]').get_attribute('value')
  for key in keys:
    page.keyboard.press(key)
  served.wait_for_next(page, token)


def test_a_link_signs_in_only_after_a_press_of_the_button(world, visit):
  world.add_annotator('linked')
  page = visit(world.origin)
  page.goto(f'/sign-in/{world.links["linked"]}')
  page.goto('/')
  assert page.url.endswith('/sign-in')
  served.sign_in(page, world.links['linked'])
  assert page.locator('.who .name').inner_text() == 'linked'
  page.get_by_role('button', name='Sign out').click()
  page.goto('/progress')
  assert page.url.endswith('/sign-in')


def test_a_password_set_by_the_annotator_signs_in(world, visit):
  world.add_annotator('secretive')
  page = visit(world.origin, allowed='status of 40')  # the wrong password
  served.sign_in(page, world.links['secretive'])
  page.goto('/account')
  page.get_by_label('New password').fill('correct horse battery')
  page.keyboard.press('Enter')
  page.get_by_role('status').filter(has_text='assword').wait_for()
  page.get_by_role('button', name='Sign out').click()
  page.get_by_label('Name').fill('secretive')
  page.get_by_label('Password').fill('wrong horse battery')
  page.keyboard.press('Enter')
  page.locator('.message').wait_for()
  assert page.locator('.who').count() == 0
  page.get_by_label('Password').fill('correct horse battery')
  page.keyboard.press('Enter')
  page.locator('.who').wait_for()
  assert page.locator('.who .name').inner_text() == 'secretive'


def test_twenty_pairs_by_keyboard_alone(world, enter):
  page = enter('keys', ['pair'] * PAIRS)
  orders, wanted = set(), {}
  for number in range(PAIRS):
    texts = shown(page)
    winner = better(texts)
    orders.add(winner)
    strength = number % 4 + 1
    if number % 5 == 4:
      wanted[frozenset(texts)] = {'tie': True}
      press(page, 't' if number % 2 else '0')
    else:
      wanted[frozenset(texts)] = {'chosen': texts[winner], 'strength': strength}
      arrow = ARROWS['AB'[winner]]
      if number % 2:
        press(page, arrow, str(strength))
      else:
        press(page, *[arrow] * strength, 'Enter')
  assert orders == {0, 1}  # either side
  assert page.locator('#task-title').inner_text() == 'No tasks left'
  judgements = world.judgements('keys')
  assert len(judgements) == PAIRS
  assert {row.texts: row.answer for row in judgements} == wanted


def test_the_order_of_the_page_is_stored(world, enter):
  page = enter('orders', ['pair'] * 4)
  orders = []
  for _ in range(4):
    orders.append(shown(page))
    press(page, 't')
  assert [row.shown for row in world.judgements('orders')] == orders


def test_ranking_by_keys(world, enter):
  page = enter('ranker', ['rank'])
  first, second, third, fourth = shown(page)
  page.keyboard.press('ArrowDown')  # to the first
  page.keyboard.press('4')  # the first becomes the last
  page.keyboard.press('ArrowUp')  # to the fourth, now third
  page.keyboard.press('Shift+ArrowUp')
  page.keyboard.press('=')  # as good as the second
  assert shown(page) == [second, fourth, third, first]
  press(page, 'Enter')
  (row,) = world.judgements('ranker')
  assert row.answer == {'ranking': [{second, fourth}, {third}, {first}]}


def test_a_move_ends_the_ties_that_it_separates(world, enter):
  """A tie is with the answer above: it must not become one with another answer."""
  page = enter('mover', ['rank'])
  texts = dict(zip('ABCD', shown(page), strict=True))
  for keys, ranks, ended in (
    ('B=', 'A1 B1 C3 D4', ''),
    ('B2', 'A1 B1 C3 D4', ''),  # stays where it is
    ('C2', 'A1 C2 B3 D4', 'B'),  # between the two
    ('B=', 'A1 C2 B2 D4', ''),
    ('D=', 'A1 C2 B2 D2', ''),
    ('B4', 'A1 C2 D2 B4', 'B'),  # out of the middle: the others stay equal
    ('C1', 'C1 A2 D3 B4', 'D'),  # the one with which D was equal
  ):
    page.locator(f'.rank > li[data-name={keys[0]}]').focus()
    page.keyboard.press(keys[1])
    cards = page.locator('.rank > li')
    assert (
      ' '.join(
        card.get_attribute('data-name') + card.locator('select').input_value()
        for card in cards.all()
      )
      == ranks
    )
    said = page.locator('#status').inner_text()
    assert said.partition('any more: ')[2] == ended
  page.locator('.rank > li').nth(0).focus()
  press(page, 'Enter')
  (row,) = world.judgements('mover')
  assert row.answer == {'ranking': [{texts[name]} for name in 'CADB']}


def test_ranking_by_drag(world, enter):
  page = enter('dragger', ['rank'])
  first, second, third, fourth = shown(page)
  page.locator('.rank-head').nth(0).drag_to(page.locator('.rank > li').nth(2))
  assert shown(page) == [second, third, first, fourth]
  token = page.locator('#task [name=token]').get_attribute('value')
  page.get_by_role('button', name='Save ranking').click()
  served.wait_for_next(page, token)
  (row,) = world.judgements('dragger')
  assert row.answer == {'ranking': [{second}, {third}, {first}, {fourth}]}


def test_best_of_four_and_ratings(world, enter):
  page = enter('chooser', ['best', 'rate'])
  texts = shown(page)
  press(page, '3')
  rated = shown(page)
  press(page, '6') if len(rated) == 1 else press(page, *'64', 'Enter')
  best, rate = world.judgements('chooser')
  assert best.answer == {'best': texts[2]}
  assert rate.answer == {'rating': dict(zip(rated, (6, 4)))}


def test_skip_flag_reason_and_undo(world, enter):
  page = enter('doubter', ['pair', 'pair'])
  skipped = frozenset(shown(page))
  press(page, 's')
  judged = shown(page)
  page.keyboard.press('f')
  page.keyboard.press('Space')
  flag = page.locator('[name=flag]:checked').get_attribute('value')
  page.keyboard.press('Escape')
  page.keyboard.press('r')
  page.keyboard.type('1 2 3 s t u: keys do nothing here')
  page.keyboard.press('Escape')
  press(page, 'ArrowRight', '2')
  page.keyboard.press('u')
  page.locator('#task').wait_for()
  assert shown(page) == judged  # in the same order again
  press(page, 'ArrowLeft', '4')
  first, wrong, undo, second = world.judgements('doubter', include_undone=True)
  assert (first.texts, first.answer) == (skipped, {'skip': True})
  assert wrong.answer == {'chosen': judged[1], 'strength': 2}
  assert wrong.reason == '1 2 3 s t u: keys do nothing here'
  assert wrong.flags == [flag]
  assert undo.answer == {'undo': True}
  assert (second.answer, second.reason) == ({'chosen': judged[0], 'strength': 4}, '')
  assert [row.answer for row in world.judgements('doubter')] == [first.answer, second.answer]


def test_reload_shows_the_same_task_in_the_same_order(world, enter):
  page = enter('reloader', ['pair'] * 3)
  texts = shown(page)
  page.keyboard.press('ArrowRight')
  page.reload()
  assert shown(page) == texts
  press(page, 't')
  after = shown(page)
  assert after != texts
  page.reload()
  assert shown(page) == after
  assert len(world.judgements('reloader')) == 1


def test_the_back_button_does_not_judge_twice(world, enter):
  page = enter('returner', ['pair'] * 3)
  press(page, 't')
  page.goto('/progress')
  press_again = 'ArrowRight', '1'
  page.go_back()
  page.locator('#task').wait_for()
  texts = shown(page)
  press(page, *press_again)
  first, second = world.judgements('returner')
  assert first.texts != second.texts
  assert second.answer == {'chosen': texts[1], 'strength': 1}


def test_a_double_click_judges_once(world, enter):
  page = enter('hasty', ['pair'] * 3)
  token = page.locator('#task [name=token]').get_attribute('value')
  page.get_by_role('button', name='Tie').dblclick()
  served.wait_for_next(page, token)
  page.wait_for_load_state('networkidle')
  assert len(world.judgements('hasty')) == 1


def test_two_tabs_judge_once(world, enter):
  page = enter('twofold', ['pair'] * 3)
  other = page.context.new_page()
  other.goto('/')
  texts = shown(page)
  assert shown(other) == texts
  press(page, 'ArrowLeft', '3')
  other.keyboard.press('ArrowRight')
  press(other, '2')
  (row,) = world.judgements('twofold')
  assert row.answer == {'chosen': texts[0], 'strength': 3}
  assert shown(other) == shown(page) != texts


def test_without_javascript(world, enter):
  page = enter('plain', ['pair', 'rank'], java_script_enabled=False)
  texts = shown(page)
  page.get_by_role('button', name='B is plainly better').or_(
    page.locator('[name=answer][value=b3]')
  ).first.click()
  ranked = shown(page)
  for number, rank in enumerate('2143'):
    page.locator(f'[name=rank-{number}]').select_option(rank)
  page.get_by_role('button', name='Save ranking').click()
  assert page.locator('#task-title').inner_text() == 'No tasks left'
  pair, rank = world.judgements('plain')
  assert pair.answer == {'chosen': texts[1], 'strength': 3}
  order = [{ranked[1]}, {ranked[0]}, {ranked[3]}, {ranked[2]}]
  assert rank.answer == {'ranking': order}


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_page_is_accessible(world, enter, scheme):
  kinds = ['pair', 'rank', 'best', 'rate']
  page = enter(f'careful-{scheme}', kinds, color_scheme=scheme)
  for _ in kinds:
    checks.accessible(page)
    press(page, 's')
  for path in ('/', '/progress', '/instructions', '/account', '/nowhere'):
    if path != '/nowhere':
      page.goto(path)
      checks.accessible(page)
  page.get_by_role('button', name='Sign out').click()
  page.locator('[name=password]').wait_for()
  checks.accessible(page)


def test_a_phone_shows_everything_without_scrolling_sideways(world, enter):
  kinds = ['pair', 'rank', 'best', 'rate']
  page = enter('walker', kinds, viewport={'width': 360, 'height': 740}, has_touch=True)
  for _ in kinds:
    checks.fits(page)
    page.get_by_role('button', name='Skip').tap()
    page.wait_for_load_state('networkidle')
  for path in ('/', '/progress', '/instructions', '/account'):
    page.goto(path)
    checks.fits(page)


def test_tab_reaches_every_control_with_visible_focus(world, enter):
  page = enter('tabber', ['pair', 'rank', 'best', 'rate'])
  for kind in ('pair', 'rank', 'best', 'rate'):
    stops = checks.tab_through(page)
    assert any('id="skip"' in stop for stop in stops), kind
    assert 'Skip to the content' in stops[0]
    press(page, 's')


def test_right_to_left_text_reads_from_the_right(world, enter):
  page = enter('reader', ['rtl'])
  text = page.locator('.prompt .text')
  assert text.evaluate('element => getComputedStyle(element).direction') == 'rtl'
  assert page.locator('.answer .text').first.evaluate(
    'element => getComputedStyle(element).direction'
  ) in ('rtl', 'ltr')
  checks.fits(page)


def test_the_next_task_is_announced_and_gets_the_focus(world, enter):
  page = enter('listener', ['pair', 'pair'])
  press(page, 't')
  assert page.evaluate('document.activeElement.id') == 'task-title'
  assert page.locator('#status').inner_text().startswith('Saved.')
