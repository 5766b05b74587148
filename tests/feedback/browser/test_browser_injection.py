"""Sixty payloads in every text that a page shows: nothing runs, nothing is fetched, all is text."""

import html
import json
import unicodedata
import urllib.parse

import checks
import jinja2
import payloads
import pytest
import served

# Places where a page without escaping would put a text.
PLACES = (
  '<p>{}</p>',
  '<textarea>{}</textarea>',
  '<title>{}</title>',
  '<style>{}</style>',
  '<script>{}</script>',
  '<!-- {} -->',
  '<svg><![CDATA[{}]]></svg>',
  '<input value="{}">',
  "<input value='{}'>",
  '<a href="{}">link</a>',
)
DECODERS = (
  str,
  html.unescape,
  urllib.parse.unquote,
  lambda text: unicodedata.normalize('NFKC', text),
  lambda text: json.loads(f'"{text}"') if '\\u' in text else text,
)


def test_each_payload_is_found_where_it_is_not_escaped(visit):
  page = visit('http://localhost')
  parse = f"""texts => texts.map(text => (
    {payloads.CLEAN})(new DOMParser().parseFromString(text, 'text/html')))"""
  for payload in payloads.ALL:
    if payload == '${7*191}':
      assert page.evaluate(f'`{payload}`') == '1337'
    elif payload in payloads.TEMPLATES:
      assert jinja2.Template(payload).render() == '1337'
    else:
      raw = [place.format(decode(payload)) for place in PLACES for decode in DECODERS]
      assert any(page.evaluate(parse, raw)), payload
      safe = [place.format(html.escape(payload)) for place in PLACES[:3]]
      assert not any(page.evaluate(parse, safe)), payload


@pytest.mark.parametrize('payload', payloads.ELEMENTS[:1] + payloads.ELEMENTS[10:11])
def test_a_script_that_runs_is_found(visit, payload):
  page = visit('http://localhost')
  page.set_content(f'<p>{payload}</p>')
  assert page.evaluate('window.runs') == 1
  assert 'scripts ran' in page.evaluate(payloads.CLEAN)[0]


GROUPS = [payloads.ALL[i : i + 5] for i in range(0, 60, 5)]
NAMES = [payload for payload in payloads.ALL if payload.isprintable()]
PROJECT = [name for name in NAMES if '#' not in name]  # ends the URL of the store as a data path
# Addresses that show what is in them, or might.
REFLECTED = (
  lambda text: f'/{text}',
  lambda text: f'/owner/elo?round={text}&ties={text}',
  lambda text: f'/owner/disagreement?flag={text}&page={text}',
  lambda text: f'/sign-in?ended={text}&name={text}&next={text}',
)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Yields a server whose prompts, answers, names, reasons and flags are payloads."""
  folder = tmp_path_factory.mktemp('injection')
  page = served.Page(
    folder / 'feedback.db',
    folder,
    name=' '.join(PROJECT),
    instructions='\n\n'.join(payloads.ALL),
  )
  owner = page.add_annotator('owner', role='owner')
  people = [page.add_annotator(name) for name in NAMES]
  policies = [' '.join(group) for group in GROUPS]
  for number, group in enumerate(GROUPS):
    completions = [
      {'text': '\n'.join(group), 'policy': policies[number]},
      {'text': '\n'.join(group[::-1]), 'policy': policies[number - 1]},
    ]
    row = {'prompt': '\n'.join(group), 'completions': completions}
    page.store.add_tasks(page.project, [row | {'overlap': 2}])
    messages = [{'role': 'user', 'content': '\n'.join(group)}]
    prompt = page.store.add_prompt(page.project, f'chat {group}', messages)
    answers = [page.store.add_completion(prompt, text, policy=text) for text in group[:2]]
    page.store.add_task(page.project, 'pair', prompt, answers, annotator=owner, priority=1)
  for annotator, name in ((people[0], 'first'), (people[1], 'second')):
    for group in GROUPS:
      assignment = page.store.next_task(page.project, annotator)
      completions = assignment.task.completions
      chosen = completions[name == 'first'].id
      page.store.judge(
        assignment,
        annotator,
        {'chosen': chosen, 'strength': 1},
        reason='\n'.join(group),
        flags=group,
        token=assignment.token,
      )
  try:
    page.start()
    yield page
  finally:
    page.stop()


def assert_shows(page, texts):
  """Asserts that the texts are on the page, as they are."""
  checks.clean(page)
  shown = ' '.join(page.locator('html').text_content().split())
  for text in texts:
    assert ' '.join(text.split()) in shown, (page.url, text)


def test_stored_payloads_are_text_on_the_pages_of_annotators(world, visit):
  page = visit(world.origin)
  served.sign_in(page, world.links['owner'])
  for _ in GROUPS:
    turn = page.locator('.prompt .text').inner_text().split('\n')
    assert tuple(turn) in GROUPS
    assert_shows(page, turn)
    token = page.locator('#task [name=token]').get_attribute('value')
    page.keyboard.press('s')
    served.wait_for_next(page, token)
  for path in ('/instructions', '/progress', '/account'):
    page.goto(path)
    assert_shows(page, PROJECT)
  page.goto('/instructions')
  assert_shows(page, payloads.ALL)


def test_stored_payloads_are_text_on_the_pages_of_owners(world, visit):
  page = visit(world.origin)
  served.sign_in(page, world.links['owner'])
  for path in ('', '/annotators', '/agreement', '/elo', '/disagreement', '/export'):
    page.goto(f'/owner{path}')
    assert_shows(page, NAMES if path == '/annotators' else PROJECT)
  page.goto('/owner/disagreement')
  for group in GROUPS:
    assert_shows(page, group)
  assert page.locator('.reason').count() == 2 * len(GROUPS)
  page.goto('/owner/elo')
  names = [' '.join(name.split()) for name in page.locator('tbody th').all_inner_texts()]
  assert sorted(names) == sorted(' '.join(' '.join(group).split()) for group in GROUPS)


@pytest.mark.parametrize('number', range(4))
def test_addresses_are_never_markup(world, visit, number):
  page = visit(world.origin, allowed='status of 4')
  served.sign_in(page, world.links['owner'])
  for payload in payloads.ALL[number::4]:
    page.goto(REFLECTED[number](urllib.parse.quote(payload, safe='')))
    checks.clean(page)


@pytest.mark.slow
def test_no_address_is_ever_markup(world, visit):
  page = visit(world.origin, allowed='status of 4')
  served.sign_in(page, world.links['owner'])
  for payload in payloads.ALL:
    for address in REFLECTED:
      page.goto(address(urllib.parse.quote(payload, safe='')))
      checks.clean(page)


def test_what_is_typed_is_never_markup(world, visit):
  page = visit(world.origin, allowed='status of 4')
  page.goto('/sign-in')
  for payload in payloads.CLOSING + payloads.ATTRIBUTES + payloads.TEMPLATES:
    page.get_by_label('Name').fill(payload)
    page.get_by_label('Password').fill(payload)
    page.keyboard.press('Enter')
    page.locator('.message').wait_for()
    checks.clean(page)
    assert page.get_by_label('Name').input_value() == payload
    page.goto('/sign-in')
  served.sign_in(page, world.links['owner'])
  page.goto('/owner/annotators')
  page.get_by_role('textbox', name='Name', exact=True).fill(payloads.IMG)
  page.get_by_role('button', name='Add', exact=True).click()
  page.locator('.message').wait_for()
  assert_shows(page, [payloads.IMG])
