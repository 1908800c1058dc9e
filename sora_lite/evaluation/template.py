"""Templates of HTML pages: texts are shown as they are, and a name that is missing is an error."""

from pathlib import Path

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Where the templates of a folder are looked up, each rendered with whatever stands in it escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
