"""Self-contained HTML pages."""

import base64
import io
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

TEMPLATES = Path(__file__).with_name('templates')
MIME = {'svg': 'image/svg+xml', 'png': 'image/png'}


def embed(figure: Figure, kind: str = 'svg') -> str:
    """The figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches='tight', dpi=110)
    return f'data:{MIME[kind]};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def render(template: str, **values: object) -> str:
    """Fill in a template of this package."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)
