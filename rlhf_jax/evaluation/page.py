"""The HTML of the report, a Jinja template for a page that loads no other files.

The page's security policy allows only this file's script and style sheet, by their hashes. Even if
a prompt, a response or a config got into the page as HTML, no script or style in it would run.
"""

import base64
import hashlib
import json
import os

import jinja2
import markupsafe

STYLE = """
:root { --page: #fbfbfa; --card: #ffffff; --ink: #1d2430; --soft: #5d6778; --line: #e4e7ec;
  --accent: #2563eb; --after: #1a7f54; --best: #eef4ff; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e6e9ef;
  --soft: #9aa5b5; --line: #303743; --accent: #7aa7ff; --after: #4cc38a; --best: #22304a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
h4 { font-size: 0.9rem; margin: 0; }
p { margin: 0.5rem 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.75rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font-size: 0.9em; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; margin: 0.5rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.8rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 0.85rem; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 9rem; }
tbody tr { border-top: 1px solid var(--line); }
tr.best { background: var(--best); font-weight: 600; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.6rem; }
figure svg { display: block; width: 100%; height: auto; }
figure h4 { padding: 0 0.2rem 0.3rem; overflow-wrap: anywhere; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
figcaption, .note { color: var(--soft); font-size: 0.875rem; }
.bar { width: 7rem; height: 0.7rem; display: block; }
.bar rect { fill: var(--accent); }
.grid { display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.wide { display: grid; gap: 0.75rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
form { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: end; margin: 0.75rem 0; }
label { display: grid; gap: 0.15rem; color: var(--soft); font-size: 0.8rem; max-width: 100%; }
input, select { font: inherit; font-size: 0.95rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 0.3rem 0.5rem; max-width: 100%; }
select { max-width: 18rem; }
input[type=search] { width: 100%; }
label.search { flex: 1 1 12rem; max-width: 24rem; }
input[type=number] { width: 6.5rem; }
output { color: var(--soft); font-size: 0.875rem; padding-bottom: 0.35rem; }
.samples { display: grid; gap: 0.75rem; }
.samples.single { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem 1rem; }
.prompt { font-weight: 600; }
.prompt, .response { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; gap: 0.5rem 1.5rem; margin-top: 0.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.pair > div { border-left: 3px solid var(--line); padding-left: 0.75rem; }
.pair > div.after { border-color: var(--after); }
.tag { font-size: 0.8rem; color: var(--soft); }
.metric { font-size: 0.9rem; break-inside: avoid; padding: 0.5rem 0; }
.metric p { margin: 0.25rem 0; }
.metric:target { background: var(--best); }
.metrics { columns: 2 24rem; column-gap: 2.5rem; }
.formula { overflow-x: auto; padding: 0.2rem 0; font-size: 1.15em; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 30rem) { th, td { padding: 0.35rem 0.28rem; font-size: 0.78rem; }
  main { padding: 1rem 0.75rem 3rem; } td.wrap { min-width: 6rem; } .bar { width: 3rem; } }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  overflow-x: auto; font-size: 0.85rem; line-height: 1.4; }
"""

# Filters, searches and sorts the samples. It compares texts and never inserts them as HTML.
SCRIPT = """
(() => {
  const form = document.getElementById('filter');
  if (!form) return;
  const list = document.getElementById('sample-list');
  const cards = Array.from(list.children);
  const fields = form.elements;
  const update = () => {
    const words = fields.search.value.toLowerCase().split(/\\s+/);
    const group = fields.group ? fields.group.value : '';
    const limits = fields.score ? [fields.least, fields.most].map(x => x.valueAsNumber) : [];
    const limited = limits.some(x => !isNaN(x));
    const score = card => fields.score ? JSON.parse(card.dataset.scores)[fields.score.value] : NaN;
    let count = 0;
    for (const card of cards) {
      const text = card.textContent.toLowerCase(), value = score(card);
      card.hidden = !(words.every(word => text.includes(word)) &&
        (!group || JSON.parse(card.dataset.groups).includes(group)) &&
        !(limited && value === undefined) && !(value < limits[0]) && !(value > limits[1]));
      count += !card.hidden;
    }
    const sign = fields.order ? Number(fields.order.value) : 0;
    const key = card => sign * (score(card) ?? -sign * Infinity);
    list.append(...(sign ? [...cards].sort((a, b) => key(b) - key(a) || 0) : cards));
    fields.count.value = count + ' of ' + cards.length;
  };
  form.addEventListener('input', update);
  form.addEventListener('submit', event => event.preventDefault());
  form.hidden = false;
  update();
})();
"""

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
{% macro named(name) -%}
{% if name in anchors %}<a href="#{{ anchors[name] }}">{{ name }}</a>{% else %}{{ name }}{% endif %}
{%- endmacro %}
<main>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ summary }}</p>{% endif %}
<nav>
{% for name, anchor in contents %}<a href="#{{ anchor }}">{{ name }}</a>
{% endfor %}</nav>

{% if stages %}
<h2 id="stages">Stages</h2>
<div class="scroll"><table>
<thead><tr>
{% for name in titles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in stages %}
<tr{% if loop.index0 == best %} class="best"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">{{ stages_note }}</p>
{% endif %}

{% if frontier or ratings %}
<h2 id="frontier">Scores and ratings</h2>
<div class="wide">
{% if frontier %}<figure>{{ frontier }}<figcaption>Scores of the policy over its KL. If the proxy
score rises while the gold score stalls or falls, the policy exploits the reward model: the best
policy is where gold peaks. Bars are standard errors.{% if best_of %} Best of n selects the best of
n samples of the baseline by the reward model, without training. Its KL is an upper bound,
log n − (n − 1) / n.{% endif %}</figcaption></figure>{% endif %}
{% if ratings %}<figure>{{ ratings }}<figcaption>Elo rating of every policy from all pairwise
matches: 400 points are odds of ten to one. If two intervals overlap, the order is uncertain.
</figcaption></figure>{% endif %}
</div>
{% endif %}

{% if final %}
<h2 id="final">Final figures</h2>
<div class="scroll"><table>
<thead><tr>{% if final|length > 1 %}<th class="text">Stage</th>{% endif %}
<th class="text">Metric</th><th>First</th><th>Last</th><th>Best</th><th>Step</th></tr></thead>
<tbody>
{% for stage, rows in final %}{% for row in rows %}
<tr>{% if final|length > 1 %}<td class="text">{{ stage if loop.first else '' }}</td>{% endif %}
<td class="text">{{ named(row[0]) }}</td>
{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</tbody></table></div>
<p class="note">First and last are the first and last logged values; step is the step of the best
value. Training metrics are of one batch, so their best value is partly luck.</p>
{% endif %}

{% if calibration %}
<h2 id="calibration">The reward model on held-out pairs</h2>
<div class="wide">
{% if reliability %}<figure>{{ reliability }}<figcaption>On the dashed line the model is right as
often as its confidence says; below the line it is overconfident. Larger points have more pairs.
</figcaption></figure>{% endif %}
<div class="scroll"><table><tbody>
{% for name, value in calibration %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</div>
{% endif %}

{% if annotators %}
<h2 id="annotators">Annotators</h2>
{% for stage, figure, rows in annotators %}
<h3>{{ stage }}</h3>
<div class="wide">
{% if figure %}<figure>{{ figure }}</figure>{% endif %}
<div class="scroll"><table><thead><tr>{% for name in annotator_titles %}<th>{{ name }}</th>
{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</div>
{% endfor %}
<p class="note">The reliability of an annotator is the inverse temperature of the choices, learned
with the reward model: 1 on average, 0 for choices at random, negative for an annotator who prefers
what others reject. It is not used when scoring.</p>
{% endif %}

{% if samples %}
<h2 id="samples">Samples</h2>
<form id="filter" hidden>
<label class="search">Search<input name="search" type="search"></label>
{% if groups %}<label>Group<select name="group">
<option value="">all</option>
{% for group in groups %}<option value="{{ group }}">{{ group }}</option>{% endfor %}
</select></label>{% endif %}
{% if score_names %}<label>Score<select name="score">
{% for name in score_names %}<option value="{{ name }}">{{ name }}</option>{% endfor %}
</select></label>
<label>At least<input name="least" type="number" step="any"></label>
<label>At most<input name="most" type="number" step="any"></label>
<label>Order<select name="order"><option value="0">as sampled</option>
<option value="1">highest score first</option><option value="-1">lowest score first</option>
</select></label>{% endif %}
<output name="count"></output>
</form>
<div id="sample-list" class="samples{% if samples[0].texts|length == 1 %} single{% endif %}">
{% for sample in samples %}
<div class="sample" data-scores="{{ sample.scores|json }}" data-groups="{{ sample.groups|json }}">
<div class="prompt">{{ sample.prompt }}</div>
<div class="pair">
{% for text in sample.texts %}<div class="{{ text.side }}"><div class="tag">{{ text.label }}</div>
<div class="response">{{ text.text }}</div></div>
{% endfor %}</div>
</div>
{% endfor %}</div>
{% endif %}

{% if curves %}
<h2 id="curves">Learning curves</h2>
<p class="note">In long runs, faint lines show the logged values and bold lines a running mean. A
metric that does not change has no figure.</p>
{% for curve in curves %}
<h3>{{ curve.stage }}</h3>
<div class="grid">
{% for name, svg in curve.panels %}<figure><h4>{{ named(name) }}</h4>{{ svg }}</figure>
{% endfor %}</div>
<details><summary>All metrics of {{ curve.stage }}</summary>
<div class="scroll"><table>
<thead><tr><th>Metric</th><th>First</th><th>Last</th><th>Min</th><th>Max</th></tr></thead>
<tbody>
{% for row in curve.rows %}
<tr><td>{{ named(row[0]) }}</td>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endfor %}
{% endif %}

{% if times %}
<h2 id="time">Time of a step</h2>
<div class="scroll"><table>
<thead><tr>{% if times|length > 1 %}<th class="text">Stage</th>{% endif %}
<th class="text">Part</th><th>Seconds</th><th>Fraction</th><th></th><th>First step</th>
</tr></thead>
<tbody>
{% for stage, rows in times %}{% for part, seconds, fraction, first in rows %}
<tr>{% if times|length > 1 %}<td class="text">{{ stage if loop.first else '' }}</td>{% endif %}
<td class="text">{{ part }}</td><td>{{ seconds }}</td>
<td>{{ '%.0f'|format(100 * fraction) }} %</td>
<td><svg class="bar" role="presentation"><rect width="{{ '%.1f'|format(100 * fraction) }}%"
height="100%"/></svg></td><td>{{ first }}</td></tr>
{% endfor %}{% endfor %}</tbody></table></div>
<p class="note">Seconds are medians over the logged steps after the first. The first step includes
compilation, so it has its own column. Other: data, logs, evaluations and checkpoints.</p>
{% endif %}

{% if config_text or differences %}
<h2 id="config">Configuration</h2>
{% for stage, changes in differences %}
<details{% if differences|length == 1 %} open{% endif %}>
<summary>{{ stage }}: {{ changes|length }} keys differ from the base config of the
algorithm</summary>
{% if changes %}
<div class="scroll"><table>
<thead><tr><th>Key</th><th class="text">Base</th><th class="text">This run</th></tr></thead>
<tbody>
{% for key, base, value in changes %}<tr><td><code>{{ key }}</code></td>
<td class="wrap"><code>{{ base }}</code></td><td class="wrap"><code>{{ value }}</code></td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
</details>
{% endfor %}
{% if config_text %}<details><summary>Full config</summary>
<pre>{{ config_text }}</pre></details>
{% endif %}
{% endif %}

{% if metrics %}
<h2 id="metrics">Metrics</h2>
<p class="note">{{ metrics_note }}</p>
<div class="metrics">
{% for metric in metrics %}<div class="metric" id="metric-{{ metric.anchor }}">
<h4>{{ metric.name }}</h4>
<p>{{ metric.meaning }}</p>
{% if metric.formula %}<div class="formula">{{ metric.formula }}</div>{% endif %}
<p class="note">Unit: {{ metric.unit }}.</p>
{% if metric.worry %}<p><b>When to worry:</b> {{ metric.worry }}</p>{% endif %}
</div>
{% endfor %}</div>
{% endif %}
</main>
<script>{{ script }}</script>
</body>
</html>
"""


def render(values, template=TEMPLATE):
  """Renders a page.

  Args:
    values: {name: value} of the template's variables, except `policy`, `style` and `script`. Texts
      are escaped.
    template: Jinja template of the page.

  Returns:
    HTML.
  """
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  environment.filters['json'] = lambda value: json.dumps(value, ensure_ascii=False)
  fixed = {
    'policy': policy(),
    'style': markupsafe.Markup(STYLE),
    'script': markupsafe.Markup(SCRIPT),
  }
  return environment.from_string(template).render(values | fixed)


def replace(path, html):
  """Writes an HTML file, which is replaced atomically, so it is never incomplete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(html, encoding='utf-8', errors='replace')
  os.replace(temporary, path)


def policy():
  """Returns the security policy, which allows only the script and the style sheet above."""
  return (
    f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src '{_hash(STYLE)}'; "
    "base-uri 'none'; form-action 'none'"
  )


def _hash(text):
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'
