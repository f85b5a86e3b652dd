"""Self-contained HTML reports."""

import base64
import io
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MIME = {'svg': 'image/svg+xml', 'png': 'image/png'}


def embed(figure: Figure, kind: str = 'svg') -> str:
    """The figure as a data URL; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches='tight', dpi=110)
    plt.close(figure)
    return f'data:{MIME[kind]};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def render(template: Path, **values: object) -> str:
    """Fill in a template, which may extend ``page.html`` beside this file."""
    folders = [template.parent, Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template.name).render(**values)
