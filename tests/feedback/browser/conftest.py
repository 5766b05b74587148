"""A browser for each module, and pages that must have no error and ask no other host."""

import re
import urllib.parse

import payloads
import pytest

from tools import screenshots

MISSING = 'needs Chromium: apt-get install chromium'


@pytest.fixture(scope='module')
def chromium():
  """Yields one Chromium, without a window."""
  path = screenshots.browser()
  if path is None:
    pytest.skip(MISSING)
  sync_api = pytest.importorskip('playwright.sync_api', reason="needs the extra 'test'")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=path, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
    )
    yield browser
    browser.close()


def _watch(page, origin, allowed, problems):
  """Collects what a page must not do."""
  host = urllib.parse.urlsplit(origin).netloc

  def request(sent):
    parts = urllib.parse.urlsplit(sent.url)
    if parts.scheme not in ('about', 'data', 'blob') and parts.netloc != host:
      problems.append(f'requested {sent.url}')
    if parts.path.startswith('/stolen'):
      problems.append(f'requested {sent.url}')

  def dialog(shown):
    problems.append(f'dialog: {shown.message}')
    shown.dismiss()

  def console(message):
    if message.type in ('error', 'warning') and not (allowed and re.search(allowed, message.text)):
      problems.append(f'console: {message.text}')

  page.on('request', request)
  page.on('dialog', dialog)
  page.on('console', console)
  page.on('pageerror', lambda error: problems.append(f'script: {error}'))


@pytest.fixture
def visit(chromium):
  """Yields a function that opens a page in a browser profile of its own.

  Its arguments are the server's origin, a regular expression of console messages that are allowed,
  and options of Playwright's `new_context`. After the test, no page may have written an error to
  the console, broken its content security policy, opened a dialog, or asked another host.
  """
  contexts, problems = [], []

  def open_page(origin, allowed='', **options):
    context = chromium.new_context(base_url=origin, **options)
    context.set_default_timeout(15_000)  # of a busy machine
    context.add_init_script(payloads.WATCH)
    context.on('page', lambda page: _watch(page, origin, allowed, problems))
    contexts.append(context)
    return context.new_page()

  yield open_page
  for context in contexts:
    context.close()
  assert not problems
