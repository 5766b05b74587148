"""A page of sections with text, figures and a table each: one HTML file that loads no others."""

from collections.abc import Sequence
import dataclasses
import pathlib

from rlhf_jax.evaluation import page


@dataclasses.dataclass(frozen=True)
class Section:
  """A section of a page.

  Attributes:
    title: its heading.
    text: sentences below the heading.
    figures: pairs (SVG of figures.py, caption).
    titles: titles of the columns of its table.
    rows: rows of its table, lists of strings; no table if there are none.
    best: index of the row that is highlighted; None for none.
    note: explanation below the table.
    wrapped: indices of columns of long texts, which are wrapped.
  """

  title: str
  text: str = ''
  figures: Sequence[tuple[str, str]] = ()
  titles: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  best: int | None = None
  note: str = ''
  wrapped: Sequence[int] = ()


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ summary }}</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.figures %}<div class="wide">
{% for svg, caption in section.figures %}<figure>{{ svg|safe }}
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% if section.rows %}<div class="scroll"><table>
<thead><tr>{% for name in section.titles %}
<th{% if loop.index0 in section.wrapped %} class="text"{% endif %}>{{ name }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in section.rows %}<tr{% if loop.index0 == section.best %} class="best"{% endif %}>
{% for cell in row %}<td{% if loop.index0 in section.wrapped %} class="wrap"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
{% endfor %}
</main>
</body>
</html>
"""


def write(path, *, title, summary, sections):
  """Writes a page.

  Args:
    path: HTML file, replaced atomically.
    title: Title of the page.
    summary: One or two sentences below the title.
    sections: Sections. Their texts are escaped; their figures are not.
  """
  html = page.render({'title': title, 'summary': summary, 'sections': sections}, TEMPLATE)
  page.replace(pathlib.Path(path), html)
