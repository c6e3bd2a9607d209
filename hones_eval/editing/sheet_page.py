"""The page of a contact sheet; it needs no other file."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Edits</title>
<style>
:root { color-scheme: light dark; --good: light-dark(#18794e, #4cc38a); --bad: light-dark(#cd2b31, #ff9592); }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .75rem .1rem 0; text-align: right; font-weight: normal; }
th:first-child { text-align: left; }
thead th { font-size: .8rem; opacity: .7; }
/* Clean beside edited is what is compared: narrow, the mask stands under them, the text beside. */
article { display: grid; gap: .5rem .75rem; padding: .75rem 0; align-items: start;
  border-top: 1px solid #8886;
  grid-template: "clean mask edited text" / 1fr 1fr 1fr 1.25fr; }
figure { margin: 0; }
figcaption { font-size: .8rem; opacity: .7; }
img { display: block; width: 100%; max-height: 20rem; object-fit: contain; object-position: left; }
p { margin: 0; overflow-wrap: anywhere; }
.clean { grid-area: clean; } .mask { grid-area: mask; } .edited { grid-area: edited; }
.text { grid-area: text; }
.question { font-weight: 600; }
.verdict { font-weight: 600; color: var(--good); }
.rejected .verdict { color: var(--bad); }
li { overflow-wrap: anywhere; }
@media (max-width: 48rem) {
  article { grid-template: "clean edited" "mask text" / 1fr 1fr; }
  .text { font-size: .85rem; }
}
</style>
</head>
<body>
<h1>Edits</h1>
<table>
<thead><tr><th>level</th><th>accepted</th><th>rejected</th><th>not editable</th></tr></thead>
<tbody>
{% for level, count in counts.items() %}
<tr><th>{{ level }}</th>{% for number in count.values() %}<td>{{ number }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% if note %}
<p>{{ note }}</p>
{% endif %}
{% for entry in entries %}
<article{% if not entry.accepted %} class="rejected"{% endif %}>
{% for name, image in entry.images.items() %}
<figure class="{{ name }}"><img src="{{ image }}" alt="{{ name }}: {{ entry.lines[0] }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}
<div class="text">
{% for line in entry.lines %}
<p{% if loop.last %} class="verdict"{% elif loop.first %} class="question"{% endif %}>{{ line }}</p>
{% endfor %}
</div>
</article>
{% endfor %}
{% if problems %}
<h2>Not editable</h2>
<ul>
{% for problem in problems %}
<li>{{ problem.question_id }}: {{ problem.reason }}</li>
{% endfor %}
</ul>
{% if more %}
<p>and {{ more }} more, in report.json</p>
{% endif %}
{% endif %}
</body>
</html>
"""
