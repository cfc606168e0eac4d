"""The markup of a page, its charts and its tables (Jinja, every value escaped). No number is computed here.

No script and nothing from elsewhere: the policy in the page's head lets a browser load neither.
"""

from jinja2 import DictLoader, Environment, StrictUndefined

from spry_app.report.style import STYLE

_TABLE = """
{% macro table(head, rows, name) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ name }}"><table>
<thead><tr>{% for title in head %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
"""

_LINES = """
{% macro line_chart(chart) %}
<ul class="legend">
{% for curve in chart.curves %}
<li><svg viewBox="0 0 22 12" aria-hidden="true">
<path class="curve s{{ curve.style }} d{{ curve.dash }}" d="M2 6H20"/></svg>
{{ curve.name }} <b>{{ curve.last }}</b></li>
{% endfor %}
</ul>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img"
  aria-label="{{ chart.title }} over {{ chart.x_label }}">
{% for tick in chart.y_ticks %}
<path class="rule" d="M{{ chart.left }} {{ tick.at }}H{{ chart.right }}"/>
<text x="{{ chart.left - 5 }}" y="{{ tick.at }}" dy="3.5" text-anchor="end">{{ tick.text }}</text>
{% endfor %}
<path class="axis" d="M{{ chart.left }} {{ chart.bottom }}H{{ chart.right }}"/>
{% for tick in chart.x_ticks %}
<text x="{{ tick.at }}" y="{{ chart.bottom + 14 }}" text-anchor="middle">{{ tick.text }}</text>
{% endfor %}
<text x="{{ (chart.left + chart.right) / 2 }}" y="{{ chart.height - 4 }}" text-anchor="middle">
{{ chart.x_label }}</text>
{% for curve in chart.curves %}
<path class="curve s{{ curve.style }} d{{ curve.dash }}" d="{{ curve.path }}"/>
{% for x, y, tip in curve.dots %}
<circle class="dot s{{ curve.style }}" cx="{{ x }}" cy="{{ y }}" r="2.5"><title>{{ tip }}</title></circle>
{% endfor %}
{% endfor %}
</svg>
{% endmacro %}
"""

_GRID = """
{% macro grid_chart(chart) %}
{% set frame = chart.frame %}
<ul class="legend"><li>{{ chart.what }}:</li>
{% for shade in chart.shades %}
<li><svg viewBox="0 0 22 12" aria-hidden="true">
<path class="l{{ shade.level }}" d="M0 0H22V12H0z"/></svg>{{ shade.means }}</li>
{% endfor %}
</ul>
<svg viewBox="0 0 {{ chart.whole_width }} {{ frame.below }}" role="img" aria-label="{{ chart.title }}">
{% for shade in chart.shades %}
<path class="l{{ shade.level }}" d="{{ shade.path }}"/>
{% endfor %}
<text x="{{ frame.left - 5 }}" y="12" text-anchor="end">{{ chart.corner }}</text>
{% for name in chart.row_labels %}
<text x="{{ frame.left - 5 }}" y="{{ name.at }}" text-anchor="end">{{ name.text }}</text>
{% endfor %}
{% for name in chart.column_labels %}
{% if frame.slanted %}
<text transform="translate({{ name.at }} {{ frame.bottom + 8 }}) rotate(-50)" text-anchor="end" dy="4">
{{ name.text }}</text>
{% else %}
<text x="{{ name.at }}" y="{{ frame.bottom + 13 }}" text-anchor="middle">{{ name.text }}</text>
{% endif %}
{% endfor %}
{% for tip in chart.tips %}
{% if tip.text %}
<text class="in{{ ' dark' if tip.dark }}" x="{{ tip.x + frame.width / 2 }}" y="{{ tip.y + frame.height / 2 + 2.8 }}">
{{ tip.text }}</text>
{% endif %}
<rect class="tip" x="{{ tip.x }}" y="{{ tip.y }}" width="{{ frame.width }}" height="{{ frame.height }}">
<title>{{ tip.tip }}</title></rect>
{% endfor %}
<text x="{{ (frame.left + chart.whole_width) / 2 }}" y="{{ frame.below - 4 }}" text-anchor="middle">
{{ chart.x_label }}</text>
</svg>
{% endmacro %}
"""

_PAGE = """
{% from "table" import table %}{% from "lines" import line_chart %}{% from "grid" import grid_chart %}
<!doctype html>
<html lang="en"><head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>{{ style | safe }}</style>
</head><body><main>
<header>
<h1>{{ page.title }}</h1>
<p class="soft">{{ page.subtitle }}</p>
<p><span class="state">{{ page.state }}</span></p>
{% for sentence in page.alerts %}
<p class="alert">{{ sentence }}</p>
{% endfor %}
</header>
{% if page.figures %}
<dl class="figures">
{% for name, value in page.figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% for section in page.sections %}
<section>
<h2>{{ section.title }}</h2>
{% for sentence in section.sentences %}
<p>{{ sentence }}</p>
{% endfor %}
{% if section.charts %}
<div class="charts">
{% for chart in section.charts %}
<figure>
<figcaption>{{ chart.title }}</figcaption>
{% if chart.curves is defined %}{{ line_chart(chart) }}{% else %}{{ grid_chart(chart) }}{% endif %}
<details><summary>Numbers</summary>{{ table(chart.head, chart.rows, chart.title) }}</details>
{% if chart.note %}<p class="soft">{{ chart.note }}</p>{% endif %}
</figure>
{% endfor %}
</div>
{% endif %}
{% if section.table %}
<div class="sheet">{{ table(section.table[0], section.table[1], section.title) }}</div>
{% endif %}
{% if section.folded %}
<details><summary>{{ section.folded[0] }}</summary>
<div class="sheet">{{ table(section.folded[1][0], section.folded[1][1], section.folded[0]) }}</div></details>
{% endif %}
</section>
{% endfor %}
<footer>Made by Spry from the files of the run's folder. This page holds no script and loads nothing.</footer>
</main></body></html>
"""

_ENVIRONMENT = Environment(
    loader=DictLoader({"table": _TABLE, "lines": _LINES, "grid": _GRID, "page": _PAGE}),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def html(page: object) -> str:
    """The whole file."""
    return _ENVIRONMENT.get_template("page").render(page=page, style=STYLE).lstrip()
