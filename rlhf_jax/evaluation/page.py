"""The HTML of the report, a Jinja template that loads nothing from anywhere."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --page: #fbfbfa; --card: #ffffff; --ink: #1d2430; --soft: #667085; --line: #e4e7ec;
  --accent: #2563eb; --after: #22a06b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e6e9ef;
  --soft: #98a2b3; --line: #303743; --accent: #7aa7ff; --after: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.75rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.8rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 0.85rem; }
th:first-child, td:first-child { text-align: left; }
tbody tr { border-top: 1px solid var(--line); }
.stages tbody tr:last-child td:first-child { font-weight: 600; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.6rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: 0.875rem; }
.grid { display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.wide { display: grid; gap: 0.75rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem 1rem; margin: 0.75rem 0; }
.prompt { font-weight: 600; }
.prompt, .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; gap: 0.5rem 1.5rem; margin-top: 0.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.pair > div { border-left: 3px solid var(--line); padding-left: 0.75rem; }
.pair > div.after { border-color: var(--after); }
.tag { font-size: 0.8rem; color: var(--soft); }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  overflow-x: auto; font-size: 0.85rem; line-height: 1.4; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ summary }}</p>{% endif %}
<nav>
{% for name, anchor in contents %}<a href="#{{ anchor }}">{{ name }}</a>
{% endfor %}</nav>

{% if stages %}
<h2 id="stages">Stages</h2>
<div class="scroll"><table class="stages">
<thead><tr>
{% for name in titles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in stages %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">{{ stages_note }}</p>
{% endif %}

{% if frontier or ratings %}
<h2 id="frontier">Scores and ratings</h2>
<div class="wide">
{% if frontier %}<figure>{{ frontier }}<figcaption>What the policy pays in KL, and what it gets.
Proxy rising while gold stalls or falls is over-optimisation of the reward model: the best policy
stands where gold peaks. Bars are standard errors.</figcaption></figure>{% endif %}
{% if ratings %}<figure>{{ ratings }}<figcaption>Elo of every policy from all pairwise matches: 400
points are odds of ten to one. Bands that overlap leave the order open.</figcaption></figure>
{% endif %}
</div>
{% endif %}

{% if calibration %}
<h2 id="calibration">The reward model on held-out pairs</h2>
<div class="wide">
{% if reliability %}<figure>{{ reliability }}<figcaption>On the dashed line the model is as often
right as it claims; below it, it is too sure of itself. Larger points hold more pairs.</figcaption>
</figure>{% endif %}
<div class="scroll"><table><tbody>
{% for name, value in calibration %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</div>
{% endif %}

{% if samples %}
<h2 id="samples">The same prompts, before and after</h2>
{% for sample in samples %}
<div class="sample">
<div class="prompt">{{ sample.prompt }}</div>
<div class="pair">
<div><div class="tag">before{{ sample.before_scores }}</div>
<div class="said">{{ sample.before }}</div></div>
<div class="after"><div class="tag">after{{ sample.after_scores }}</div>
<div class="said">{{ sample.after }}</div></div>
</div>
</div>
{% endfor %}
{% endif %}

{% if curves %}
<h2 id="curves">Learning curves</h2>
<p class="note">Faint lines are the logged values, bold ones a running mean.</p>
{% for curve in curves %}
<h3>{{ curve.stage }}</h3>
<div class="grid">
{% for svg in curve.panels %}<figure>{{ svg }}</figure>
{% endfor %}</div>
<details><summary>Every metric of {{ curve.stage }}</summary>
<div class="scroll"><table>
<thead><tr><th>Metric</th><th>First</th><th>Last</th><th>Least</th><th>Most</th></tr></thead>
<tbody>
{% for row in curve.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endfor %}
{% endif %}

{% if config_text %}
<h2 id="config">Configuration</h2>
<details><summary>Show</summary><pre>{{ config_text }}</pre></details>
{% endif %}
</main>
</body>
</html>
"""
