"""The owner's pages in Chromium, with three rounds of judgements."""

import checks
import pytest
import served

from tools import feedback_example

PATHS = [f'/owner{path}' for path in ('', '/annotators', '/agreement', '/elo', '/disagreement')]
PATHS.append('/owner/export')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Yields a server of the made-up project."""
  folder = tmp_path_factory.mktemp('owner')
  page = served.Page(folder / 'feedback.db', folder, name='other')
  page.project = feedback_example.fill(page.store)
  page.options['project'] = feedback_example.NAME
  page.add_annotator('Olga', role='owner')
  try:
    page.start()
    yield page
  finally:
    page.stop()


@pytest.fixture
def enter(world, visit):
  """Returns a function that opens a page as the owner."""

  def enter_(**options):
    page = visit(world.origin, **options)
    served.sign_in(page, world.links['Olga'])
    return page

  return enter_


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_page_is_accessible(enter, scheme):
  page = enter(color_scheme=scheme)
  for path in PATHS:
    page.goto(path)
    assert page.locator('h1').count() == 1
    checks.accessible(page)


def test_a_phone_shows_everything_without_scrolling_sideways(enter):
  page = enter(viewport={'width': 360, 'height': 740}, has_touch=True)
  for path in PATHS:
    page.goto(path)
    checks.fits(page)


def test_tab_reaches_every_control_with_visible_focus(enter):
  page = enter()
  for path in ('/owner/annotators', '/owner/elo', '/owner/export'):
    page.goto(path)
    checks.tab_through(page)


def test_the_pages_follow_one_another_by_their_links(enter):
  page = enter()
  page.get_by_role('link', name='Owner', exact=True).click()
  for name in ('Annotators', 'Agreement', 'Elo', 'Disagreement', 'Export'):
    tabs = page.get_by_role('navigation', name='Owner')
    tabs.get_by_role('link', name=name, exact=True).click()
    page.get_by_role('heading', level=1, name=name, exact=True).wait_for()


def test_the_best_policy_is_first_and_the_picture_has_every_policy(enter):
  page = enter()
  page.goto('/owner/elo')
  names = page.locator('tbody th').all_inner_texts()
  assert names == list(feedback_example.POLICIES[::-1])
  picture = page.locator('.picture svg')
  assert picture.bounding_box()['width'] > 300
  for name in names:
    assert name in picture.text_content()
  page.get_by_label('Control for lengths').check()
  page.get_by_role('button', name='Show').click()
  page.wait_for_url('**style=1')
  assert page.locator('tbody tr').count() == 4


def test_the_simulated_annotator_is_marked(enter):
  page = enter()
  page.goto('/owner/annotators')
  row = page.locator('tr').filter(has_text=feedback_example.SIMULATED)
  assert row.locator('.badge').inner_text().lower() == 'simulated'


def test_a_new_annotator_signs_in_by_the_link_until_disabled(world, enter, visit):
  page = enter()
  page.goto('/owner/annotators')
  page.get_by_label('Name').fill('Noor')
  page.get_by_role('button', name='Add', exact=True).click()
  link = page.get_by_label('Personal link').input_value()
  assert link.startswith(f'{world.origin}/sign-in/')
  other = visit(world.origin, allowed='status of 404')
  served.sign_in(other, link.rpartition('/')[2])
  assert other.locator('.who .name').inner_text() == 'Noor'
  page.get_by_role('button', name='Disable Noor').click()
  page.get_by_role('button', name='Enable Noor').wait_for()
  assert page.get_by_label('Personal link').count() == 0  # it was shown once
  other.goto('/')
  assert other.url.endswith('/sign-in')


def test_the_download_has_the_judgements(world, enter):
  page = enter()
  page.goto('/owner/export')
  with page.expect_download() as download:
    page.get_by_role('button', name='Download pairs').click()
  lines = download.value.path().read_text().splitlines()
  assert len(lines) == len(world.store.records(world.project, form='pairs'))
  assert download.value.suggested_filename == 'pairs.jsonl'
