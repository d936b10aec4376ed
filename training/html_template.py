"""The page of `training.html_report`, as a Jinja template: one file, no scripts, nothing loaded from elsewhere."""

# ruff: noqa: E501 - a line break inside an element would be part of what it shows

from __future__ import annotations

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ title }}</title>
<style>
:root { --ink: #1b2430; --soft: #52606d; --line: #d9e0e7; --shade: #f4f7fa; --accent: #1f5fa8; --warn: #9a3412; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, caption { color: var(--soft); }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1.25rem 0 0; list-style: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1.75rem 0 0; padding: 0; }
.cards div { background: var(--shade); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: .1rem 0 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.cards small { display: block; font-size: .8rem; color: var(--soft); }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
.narrow img { max-width: min(100%, 46rem); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-size: .9rem; padding-bottom: .35rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody th, td.text, th.text { text-align: left; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--shade); }
.facts th { white-space: nowrap; color: var(--soft); font-weight: 400; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.matrix td, .matrix th { padding: .2rem .5rem; font-size: .85rem; }
.matrix .hit { background: #dbe9f8; font-weight: 600; }
.matrix .none { color: var(--soft); }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9em; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; padding: 0; list-style: none; }
.pairs > li { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; }
.pairs h3 { margin: 0 0 .6rem; }
.shots { display: flex; flex-wrap: wrap; gap: .75rem; }
.shots figure { margin: 0; width: 5.25rem; }
.shots img { width: 5.25rem; height: 5.25rem; object-fit: contain; background: var(--shade); border: 1px solid var(--line); border-radius: .25rem; }
.shots .small { image-rendering: pixelated; }
.shots figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
.shots blockquote { margin: 0; font-size: .85rem; border-left: 3px solid var(--line); padding-left: .6rem; width: 100%; }
.warn { border-left: 4px solid var(--warn); background: #fdf3ee; padding: .6rem 1rem; border-radius: .25rem; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 3rem; margin-top: 3rem; }
@media print { details > * { display: block; } h2 { break-after: avoid; } figure, li { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<nav aria-label="Sections"><ul>
{% for id, heading in sections %}<li><a href="#{{ id }}">{{ heading }}</a></li>
{% endfor %}</ul></nav>
<dl class="cards">
{% for card in cards %}<div><dt>{{ card.name }}</dt><dd>{{ card.value }}{% if card.note %}<small>{{ card.note }}</small>{% endif %}</dd></div>
{% endfor %}</dl>
</header>
<main>
{% for warning in warnings %}<p class="warn">{{ warning }}</p>
{% endfor %}
{% if served %}
<section aria-labelledby="endpoint"><h2 id="endpoint">Endpoint</h2>
<div class="wide"><table class="facts"><caption>What was asked and what came back</caption><tbody>
{% for name, value in served.facts %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
{% if served.failures %}<details open><summary>{{ served.failures | length }} failed requests</summary>
<div class="wide"><table><caption>Requests without an answer; the figures leave them out</caption>
<thead><tr><th scope="col" class="text">sample</th><th scope="col" class="text">reason</th></tr></thead><tbody>
{% for name, reason in served.failures %}<tr><th scope="row">{{ name }}</th><td class="text">{{ reason }}</td></tr>
{% endfor %}</tbody></table></div></details>{% endif %}
</section>
{% endif %}
{% if pictures.curves %}
<section aria-labelledby="training"><h2 id="training">Training</h2>
<figure><img src="{{ pictures.curves }}" alt="{{ curves_alt }}">
<figcaption>{{ curves_caption }}; the dotted line is the epoch that was kept.</figcaption></figure>
<details><summary>The same as a table</summary><div class="wide"><table><caption>Per epoch</caption>
<thead><tr>{% for name in history_columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in history %}<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
</section>
{% endif %}
{% if task == "multi-class" %}
<section aria-labelledby="classes"><h2 id="classes">Classes</h2>
<div class="wide"><table><caption>Figures per class. ROC AUC and average precision: this class against all others.</caption>
<thead><tr><th scope="col" class="text">class</th><th scope="col">precision</th><th scope="col">recall</th><th scope="col">F1</th><th scope="col">ROC AUC</th><th scope="col">average precision</th><th scope="col">samples</th></tr></thead>
<tbody>
{% for row in classes %}<tr><th scope="row">{{ row.label }}</th><td>{{ row.precision }}</td><td>{{ row.recall }}</td><td>{{ row.f1 }}</td><td>{{ row.roc_auc }}</td><td>{{ row.average_precision }}</td><td>{{ row.images }}</td></tr>
{% endfor %}</tbody></table></div>
</section>
<section aria-labelledby="confusion"><h2 id="confusion">Confusion matrix</h2>
<figure class="narrow"><img src="{{ pictures.confusion }}" alt="Confusion matrix. {{ confusion_alt }}">
<figcaption>True labels down, predicted labels across; the colour is the share of the true class.</figcaption></figure>
{% if matrix %}<details><summary>The same as a table</summary><div class="wide"><table class="matrix">
<caption>Samples by true label (rows) and predicted label (columns)</caption>
<thead><tr><th scope="col" class="text">true</th>{% for label in labels %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for row in matrix %}{% set number = loop.index0 %}<tr><th scope="row">{{ labels[number] }}</th>{% for count in row %}<td class="{{ 'hit' if loop.index0 == number else 'none' if not count else '' }}">{{ count }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>{% endif %}
</section>
{% if pictures.curves_of_classes %}
<section aria-labelledby="roc"><h2 id="roc">ROC and precision-recall</h2>
<figure><img src="{{ pictures.curves_of_classes }}" alt="{{ roc_alt }}">
<figcaption>Each class against all others as the threshold on its probability falls. The areas of all classes stand in the table of classes.</figcaption></figure>
</section>
{% endif %}
<section aria-labelledby="calibration"><h2 id="calibration">Calibration</h2>
<p>{{ calibration }}</p>
<figure><img src="{{ pictures.reliability }}" alt="{{ reliability_alt }}">
<figcaption>Share of right answers among those of about equal probability. On the diagonal an answer with 80&nbsp;% is right in 80 of 100 cases; below it the model is too sure. Below: how many answers each bin holds.</figcaption></figure>
<details><summary>The bins as a table</summary><div class="wide"><table><caption>Answers by the probability of their first label</caption>
<thead><tr><th scope="col" class="text">probability</th><th scope="col">answers</th><th scope="col">mean probability</th><th scope="col">share right</th></tr></thead><tbody>
{% for bin in bins %}<tr><th scope="row">{{ bin.range }}</th><td>{{ bin.count }}</td><td>{{ bin.confidence }}</td><td>{{ bin.accuracy }}</td></tr>
{% endfor %}</tbody></table></div></details>
<p class="soft">Expected calibration error: the sum over {{ bins | length }} bins of (answers in the bin / all answers) &times; |share right &minus; mean probability|. Temperature scaling: softmax(z / T) for the logits z, T with the least negative log-likelihood on the validation split, its targets smoothed after Platt, <cite>Probabilistic Outputs for Support Vector Machines</cite>, 1999. Both after Guo, Pleiss, Sun, Weinberger, <cite>On Calibration of Modern Neural Networks</cite>, ICML 2017.</p>
</section>
<section aria-labelledby="mistakes"><h2 id="mistakes">Most confused pairs</h2>
{% if pairs %}<p>The most frequent mistakes, each with those that the model was surest of.</p>
<ol class="pairs">
{% for pair in pairs %}<li><h3>{{ pair.label }} &rarr; {{ pair.predicted }} <span class="soft">({{ pair.count }}&times;)</span></h3>
<div class="shots">
{% for shot in pair.shots %}{% if shot.picture %}<figure><img class="{{ 'small' if shot.small else '' }}" src="{{ shot.picture }}" alt="{{ shot.alt }}"><figcaption>{{ shot.sure }}<br>{{ shot.name }}</figcaption></figure>
{% else %}<blockquote>{{ shot.text }}<br><span class="soft">{{ shot.sure }}, {{ shot.name }}</span></blockquote>
{% endif %}{% endfor %}</div></li>
{% endfor %}</ol>
{% else %}<p>There are none: every answer is right.</p>{% endif %}
</section>
{% else %}
{% for panel in panels %}<section aria-labelledby="{{ panel.id }}"><h2 id="{{ panel.id }}">{{ panel.heading }}</h2>
<figure><img src="{{ panel.picture }}" alt="{{ panel.alt }}">
<figcaption>{{ panel.caption }}</figcaption></figure>
{% if panel.rows %}<div class="wide"><table><caption>{{ panel.about }}</caption>
<thead><tr>{% for name in panel.columns %}<th scope="col"{% if loop.first %} class="text"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in panel.rows %}<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
</section>
{% endfor %}
<section aria-labelledby="mistakes"><h2 id="mistakes">Worst mistakes</h2>
{% if shots %}<p>The answers that are furthest off, the worst first.</p>
<div class="shots">
{% for shot in shots %}{% if shot.picture %}<figure><img class="{{ 'small' if shot.small else '' }}" src="{{ shot.picture }}" alt="{{ shot.alt }}"><figcaption>{{ shot.sure }}<br>{{ shot.name }}</figcaption></figure>
{% else %}<blockquote>{{ shot.text }}<br><span class="soft">{{ shot.sure }}, {{ shot.name }}</span></blockquote>
{% endif %}{% endfor %}</div>
{% else %}<p>There are none: every answer is right.</p>{% endif %}
</section>
{% endif %}
{% for block in blocks %}
<section aria-labelledby="{{ block.id }}"><h2 id="{{ block.id }}">{{ block.heading }}</h2>
{% if block.facts %}<div class="wide"><table class="facts"><caption>{{ block.caption }}</caption><tbody>
{% for name, value in block.facts %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if block.text %}<pre tabindex="0" aria-label="{{ block.heading }}"><code>{{ block.text }}</code></pre>{% endif %}
</section>
{% endfor %}
</main>
<footer><p>Written by Marina. Everything on this page is in this one file.</p></footer>
</body>
</html>
"""
