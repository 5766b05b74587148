"""Checks of one page in the browser: accessibility, size on a phone, focus, injected markup."""

import payloads

# Elements that a finger or a pointer aims at; links within a sentence may be as high as the line.
TARGETS = """() => [...document.querySelectorAll(
    'button, select, textarea, summary, input:not([type=hidden]), nav a, a[role=button], .button')]
  .filter(element => element.checkVisibility())
  .map(element => [element, (element.closest('label') || element).getBoundingClientRect()])
  .filter(([element, box]) => box.width > 1 && box.height > 1)  // hidden but for screen readers
  .filter(([element, box]) => box.width < 24 || box.height < 24)
  .map(([element, box]) => `${element.outerHTML.slice(0, 90)}: ${box.width} x ${box.height}`)"""

# What sticks out of the window to the right, deepest elements only.
WIDE = """() => document.documentElement.scrollWidth <= document.documentElement.clientWidth ? []
  : [...document.querySelectorAll('body *')]
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
    .map(element => element.outerHTML.slice(0, 90))"""

# The focused element, and whether it or its label has an outline or a shadow.
FOCUSED = """() => {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  const label = element.closest('label');
  const outline = getComputedStyle(element).outlineStyle !== 'none'
    || getComputedStyle(element).boxShadow !== 'none'
    || label && getComputedStyle(label).outlineStyle !== 'none'
    || label && getComputedStyle(label).boxShadow !== 'none';
  window.stops = window.stops || new Set();
  const again = window.stops.has(element);
  window.stops.add(element);
  return {tag: element.outerHTML.slice(0, 120), visible: outline, again: again};
}"""


def accessible(page):
  """Asserts that axe-core finds no serious or critical violation.

  https://github.com/dequelabs/axe-core/blob/develop/doc/rule-descriptions.md
  """
  from axe_playwright_python.sync_playwright import Axe

  found = Axe().run(page).response['violations']
  serious = [
    f'{rule["id"]}: {node["html"][:150]} {node["failureSummary"][:200]}'
    for rule in found
    if rule['impact'] in ('serious', 'critical')
    for node in rule['nodes']
  ]
  assert not serious, (page.url, serious)


def fits(page):
  """Asserts that nothing sticks out sideways and that all targets have 24 pixels or more."""
  wide, small = page.evaluate(WIDE), page.evaluate(TARGETS)
  assert not wide, (page.url, wide)
  assert not small, (page.url, small)


def clean(page):
  """Asserts that no text of the page became markup, ran or was blocked."""
  assert page.evaluate(payloads.CLEAN) == [], page.url


def tab_through(page, most=80):
  """Presses Tab until the focus comes round; every stop must show the focus.

  Args:
    page: Page of Playwright.
    most: Number of stops after which it gives up.

  Returns:
    The beginnings of the tags that had the focus.
  """
  stops = []
  page.evaluate('window.stops = null; document.activeElement.blur()')
  for _ in range(most):
    page.keyboard.press('Tab')
    focused = page.evaluate(FOCUSED)
    if focused is None or focused['again']:
      return stops
    assert focused['visible'], (page.url, focused['tag'])
    stops.append(focused['tag'])
  raise AssertionError(f'{page.url}: Tab does not come round in {most} stops')
