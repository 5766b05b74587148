"""Sixty payloads in every text that a page shows: nothing runs, nothing is fetched, all is text."""

import html
import json
import unicodedata
import urllib.parse

import jinja2
import payloads
import pytest

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
