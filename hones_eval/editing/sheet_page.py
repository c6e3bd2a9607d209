"""The page of a contact sheet; it needs no other file."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Edits</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; }
article { display: flex; flex-wrap: wrap; gap: .75rem; padding: .75rem 0; border-top: 1px solid #8886; }
figure { margin: 0; }
figcaption { font-size: .8rem; opacity: .7; }
img { display: block; max-width: 100%; }
p { margin: 0; }
.text { flex: 1 1 16rem; }
.verdict { font-weight: 600; color: #18794e; }
.rejected .verdict { color: #cd2b31; }
</style>
</head>
<body>
<h1>Edits</h1>
<p>{{ note }}</p>
{% for entry in entries %}
<article{% if not entry.accepted %} class="rejected"{% endif %}>
{% for name in names %}
<figure><img src="{{ entry.pictures[loop.index0] }}" alt="{{ name }}: {{ entry.lines[1] }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}
<div class="text">
{% for line in entry.lines %}
<p{% if loop.last %} class="verdict"{% elif loop.first %} class="id"{% endif %}>{{ line }}</p>
{% endfor %}
</div>
</article>
{% endfor %}
</body>
</html>
"""
