"""What MkDocs has to be told to make a site of pages that GitHub shows as well; mkdocs.yml names this file.

- A page may link to any file of the repository, by its relative path. The site has a page of each file that is linked to:
  Markdown as it is, source in a code block, a folder as its README or as a list.
- Formulas, ``$...$`` and blocks of ``math``, become MathML, which browsers show without a script.
- Docstrings are written for Sphinx: roles become code, ``.. math::`` a block of ``math``, and a table stays as it is
  typed.
"""

import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(?<=\]\()([^)\s#:]+)(?=[)#])')
FORMULA = re.compile(r'^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|\s*(?=\n\1 +\S)))*)', re.MULTILINE)
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yml': 'yaml', '.toml': 'toml', '.cff': 'yaml'}


def on_config(config):
    fence = {'name': 'math', 'class': 'math', 'format': lambda source, *_, **__: convert(source, display='block')}
    config.mdx_configs['pymdownx.superfences'] = {'custom_fences': [fence]}
    config.markdown_extensions.append(Formulas())
    return config


def on_files(files, config):
    """Add a page of each file outside of docs that a page links to, and of what those link to."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for target in linked(page.content_string, page.src_uri):
            if files.get_file_from_path(site_uri(target)) is None:
                added = File.generated(config, site_uri(target), content=as_page(target))
                files.append(added)
                if target.endswith('.md') or (ROOT / target).is_dir():
                    waiting.append(added)
    return files


def on_page_markdown(markdown, page, config, files):
    """Have links lead to the pages of the site."""
    if 'source' in page.meta:
        return markdown
    folder = posixpath.dirname(page.file.src_uri)

    def follow(match):
        target = resolve(match[1], page.file.src_uri)
        return posixpath.relpath(site_uri(target), folder or '.') if target else match[1]

    return LINK.sub(follow, markdown)


def linked(markdown, uri):
    return {target for target in (resolve(link, uri) for link in LINK.findall(markdown)) if target}


def resolve(link, uri):
    """What a link of a page leads to, from the root of the repository; None where that is nothing of it."""
    inside = (ROOT / 'docs' / uri).is_file()
    target = posixpath.normpath(posixpath.join('docs' if inside else '', posixpath.dirname(uri), link))
    return target if not target.startswith('..') and (ROOT / target).exists() else None


def site_uri(target):
    """The page of the site for a file or folder of the repository."""
    path = ROOT / target
    if target == 'README.md':
        return target  # of docs: the site's own front page
    if path.is_dir():
        return site_uri(f'{target}/README.md') if (path / 'README.md').is_file() else f'{target}/index.md'
    if target.startswith('docs/'):
        return target.removeprefix('docs/')
    return target if path.suffix == '.md' else f'{target}.md'


def as_page(target):
    path = ROOT / target
    if path.suffix == '.md':
        return path.read_text()
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.suffix == '.py')
        return f'# {target}\n\n' + '\n'.join(f'- [{name}]({name})' for name in names) + '\n'
    head = f'---\nsource: true\nsearch:\n  exclude: true\n---\n\n# {target}\n\n'
    return f'{head}````{LANGUAGES.get(path.suffix, "text")}\n{path.read_text()}````\n'


def as_fence(match):
    lines = [match[1] + line.strip() for line in match[2].splitlines() if line.strip()]
    return '\n'.join([f'{match[1]}```math', *lines, f'{match[1]}```'])


def as_code(match):
    indent = re.match(' *', match[0])[0]
    return f'{indent}```text\n{match[0]}\n{indent}```'


class Formulas(Extension):
    def extendMarkdown(self, md):
        md.inlinePatterns.register(Formula(r'(?<!\$)\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\$)', md), 'formula', 185)


class Formula(InlineProcessor):
    def handleMatch(self, m, data):
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class Roles(griffe.Extension):
    """Sphinx's roles and formulas in docstrings."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = self.as_markdown(obj.docstring.value)

    def as_markdown(self, text):
        text = re.sub(r'^( *)Example:$', r'\1Examples:', text, flags=re.MULTILINE)  # else no code block
        text = re.sub(r':math:`([^`]+)`', r'$\1$', text)
        text = re.sub(r':\w+:`~?([^`]+)`', r'`\1`', text)
        text = re.sub(r'^ *=+  =.*\n(?:.*\n)*? *=+  =.*\n(?:.*\n)*? *=+  =.*$', as_code, text, flags=re.MULTILINE)
        return FORMULA.sub(as_fence, text)
