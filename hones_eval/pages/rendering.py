"""Templates of self-contained pages, with one style and one content security policy."""

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from hones_eval.version import __version__


def render(package: str, template: str, script: str, **context: Any) -> str:
    """Render a template of a package, which extends `page.html` of `hones_eval.pages`.

    Args:
        package: the package that holds the template and the script.
        template: the template's file name.
        script: the file name of the page's only script.
        context: values of the template; all text is escaped.
    """
    return _environment(package, script).get_template(template).render(version=__version__, **context)


@lru_cache
def _environment(package: str, script_name: str) -> Environment:
    here, shared = files(package), files("hones_eval.pages")

    def load(name: str) -> str:
        return ((shared if name == "page.html" else here) / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = load(script_name)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The content security policy allows this one script only, even if unescaped text ever got into a page.
    environment.filters["breakable"] = breakable
    environment.globals |= {
        "script": Markup(script),
        "style": Markup((shared / "page.css").read_text(encoding="utf-8")),
        "script_hash": f"sha256-{digest}",
    }
    return environment


def breakable(text: str) -> Markup:
    """Escaped text that may break after `_`, `/` and `+`, so that long names fit narrow columns."""
    return Markup(re.sub(r"([_/+])", r"\1<wbr>", str(escape(text))))
