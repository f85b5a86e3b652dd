"""What the pages print is true: code blocks are read, built or run, commands parse, and links lead somewhere.

A block that cannot be tried has a comment before it that says why: ``<!-- not run: ... -->``. Its commands are parsed all
the same. The blocks of docs/extend.md are run by test_extend.py.
"""

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope

import mmkd
from mmkd import checks, cli
from mmkd.__main__ import COMMANDS
from mmkd.hosts.config_files import read_config_file
from mmkd.hosts.configs import fill_in_class_names
from mmkd.registry import DISTILLERS, SOURCES
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'configs' / 'README.md', *(ROOT / 'docs').rglob('*.md')]
NAMES = sorted(str(page.relative_to(ROOT)) for page in PAGES)


class Block(NamedTuple):
    page: str
    line: int
    language: str  # 'shell' of an indented block
    text: str
    why_not: str  # it is not run

    @property
    def name(self) -> str:
        """The file that a block is, by its first line: ``# name.py``."""
        named = re.match(r'# (\w+\.py)\n', self.text)
        return named[1] if named else ''


def blocks(page: str) -> list[Block]:
    lines = (ROOT / page).read_text().splitlines()
    found, row = [], 0
    while row < len(lines):
        start, fence = row, re.match(r'```(\w*)$', lines[row])
        row += 1
        if fence:
            end = lines.index('```', row)
            language, text, row = fence[1], lines[row:end], end + 1
        elif lines[start].startswith('    ') and not lines[start - 1]:
            while row < len(lines) and lines[row].startswith('    '):
                row += 1
            language, text = 'shell', [line[4:] for line in lines[start:row]]
        else:
            continue
        before = next((line for line in reversed(lines[:start]) if line), '')
        marked = re.fullmatch(r'<!-- not run.*?: (.+) -->', before)
        found.append(Block(page, start + 1, language, '\n'.join([*text, '']), marked[1] if marked else ''))
    return found


BLOCKS = [block for page in NAMES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == 'python' and block.page != 'docs/extend.md']


def of(found: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize('block', found, ids=[f'{block.page}:{block.line}' for block in found])


def write_page(page: str, folder: Path, data: str = '') -> None:
    """The named blocks of a page, as files."""
    for block in PYTHON:
        if block.page == page and block.name:
            (folder / block.name).write_text(re.sub('/path/to/(mine|bccd)/', f'{data}/', block.text))


def is_config(block: Block) -> bool:
    return bool(block.name) and '_base_ =' in block.text


def test_blocks_are_found():
    assert len(PYTHON) > 40
    assert {block.language for block in BLOCKS} <= {'python', 'shell', 'math', 'text'}
    assert {'my_gid.py', 'seg_cwd.py', 'bccd_gid.py', 'several.py'} <= {block.name for block in PYTHON}


@of(PYTHON)
def test_python(block, tmp_path, monkeypatch):
    """Configs are read, and everything in them is known; distillers are built; other files are run."""
    tree = ast.parse(block.text)
    if block.why_not:
        return
    monkeypatch.chdir(tmp_path)
    if block.text.startswith('# configs/'):
        path = ROOT / block.text.split(',')[0].removeprefix('# ')
        assert ast.dump(tree) == ast.dump(ast.parse(path.read_text()))
    elif is_config(block):
        write_page(block.page, tmp_path)
        config = read_config_file(tmp_path / block.name)
        checks.check_kinds(config)
        checks.check_names(config, ('train', 'val'))
        if block.page == 'docs/schemes.md' and 'student' in config.model:  # others are those of configs by another name
            build(config)
        for entry in config.model.get('distillers', {}).values():
            build_distiller(entry)
    elif block.name:
        weights = {f'{part}.neck.weight': torch.ones(1) for part in ('architecture', 'teacher')}
        torch.save({'state_dict': weights}, 'razor.pth')  # what one of them reads
        runpy.run_path(str(write(tmp_path / block.name, block.text)))
        if block.name == 'from_razor.py':
            assert list(torch.load('student.pth')['state_dict']) == ['neck.weight']
    else:  # parts of a config, of which one may come several times
        for statement in tree.body:
            part = read_config_file(write(tmp_path / 'part.py', ast.unparse(statement)))
            for entry in part.get('distillers', {}).values():
                build_distiller(entry)


def build(config: Config) -> BaseModel:
    fill_in_class_names(config)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return MODELS.build(config.model)


def build_distiller(entry: dict) -> None:
    of_entries = ('teacher', 'learner', 'combine', 'uncertainty')
    DISTILLERS.build({key: value for key, value in entry.items() if key not in of_entries})


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_loop_of_schemes_runs(tmp_path):
    (block,) = [block for block in PYTHON if 'mmkd.distill(student, teacher' in block.text]
    wide = detectors.retinanet(channels=24)
    given = dict(student=models.build(detectors.retinanet(), seed=0))
    given['teacher'] = dict(config=wide, checkpoint=models.save_weights(wide, tmp_path / 'teacher.pth'))
    batch = random_batch(given['student'], (2, 3, 64, 64))
    given['data'] = given['student'].data_preprocessor(batch, True)
    exec(block.text, given)
    assert 'gid.loss_feature' in given['losses']
    assert type(given['model']).__name__ == 'RetinaNet'


@pytest.fixture(scope='module')
def detection_data(tmp_path_factory):
    """Two images, and an annotation file for each name and each list of classes in docs/own_data.md."""
    root = tmp_path_factory.mktemp('detection')
    for folder in ('images', 'annotations'):
        (root / folder).mkdir()
    images = [dict(id=index, file_name=f'{index}.jpg', height=64, width=96) for index in range(2)]
    for image in images:
        cv2.imwrite(str(root / 'images' / image['file_name']), np.zeros((64, 96, 3), np.uint8))
    boxes = [dict(id=n, image_id=n, category_id=1, bbox=[8, 8, 40, 40], area=1600, iscrowd=0) for n in range(2)]
    for prefix, classes in (('', ('helmet', 'vest')), ('instances_', ('RBC', 'WBC', 'Platelets'))):
        categories = [dict(id=number + 1, name=name) for number, name in enumerate(classes)]
        content = json.dumps(dict(images=images, annotations=boxes, categories=categories))
        for split in ('train', 'val'):
            (root / 'annotations' / f'{prefix}{split}.json').write_text(content)
    return root


@pytest.fixture(scope='module')
def segmentation_data(tmp_path_factory):
    root = tmp_path_factory.mktemp('segmentation')
    labels = np.eye(64, 96, dtype=np.uint8)
    for split in ('train', 'val'):
        for kind, name, picture in (('images', '0.jpg', np.dstack([labels] * 3)), ('labels', '0.png', labels)):
            (root / kind / split).mkdir(parents=True)
            cv2.imwrite(str(root / kind / split / name), picture)
    return root


@pytest.mark.parametrize('name', ['my_gid.py', 'bccd_gid.py', 'bccd_unlabelled.py', 'seg_cwd.py'])
def test_own_data(name, tmp_path, detection_data, segmentation_data):
    """Teacher, student alone and distilled student fit the data; the student learns from that teacher."""
    data = segmentation_data if name.startswith('seg') else detection_data
    write_page('docs/own_data.md', tmp_path, str(data))
    folder = name.partition('_')[0]
    for each in (f'{folder}_teacher.py', f'{folder}_student.py', name):
        config = read(tmp_path / each)
        checks.check_options(config)
        assert checks.check_data(config, ('train', 'val')) == []
        checks.check_heads(config)
        assert checks.compare_batch_size(config) == []
    model = build(config)
    plain = Config.fromfile(tmp_path / f'{folder}_student.py').model
    assert type(model).__name__ == f'Distilled{plain.type}'
    assert len(model.distillers) == 1


def read(path: Path) -> Config:
    return cli.read_config(argparse.Namespace(config=str(path), **UNCHANGED))


UNCHANGED = dict(cfg_options={}, trust_checkpoint=False, launcher='none', local_rank=0, work_dir=None)


class Parsed(Exception):
    """Instead of running a command."""


def parse(command: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What a command makes of its arguments."""
    stock = argparse.ArgumentParser.parse_args

    def parse_args(self, *given):
        self.allow_abbrev = False
        raise Parsed(stock(self, *given))

    monkeypatch.setattr(sys, 'argv', [f'mmkd {command}', *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    with pytest.raises(Parsed) as parsed:
        import_module(f'mmkd.commands.{command}').main()
    monkeypatch.undo()
    return parsed.value.args[0]


def commands(text: str) -> list[list[str]]:
    """The words of each command, without the variables before it."""
    lines = text.replace('\\\n', ' ').replace(' && ', '\n').splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[next(i for i, word in enumerate(words) if '=' not in word) :] for words in split if words]


SHELL = [block for block in BLOCKS if block.language == 'shell']


@of(SHELL)
def test_commands(block, monkeypatch):
    """Files and targets are there, options are those of the command, and what they change is in the config."""
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    for words in commands(block.text):
        program, *rest = words
        for word in words:
            if re.match(r'(configs|tools|demo|tests)/', word):
                assert (ROOT / word).exists(), word
        if program == 'python' and re.match(r'tools/\w+\.py', rest[0]):
            program, rest = 'mmkd', [Path(rest[0]).stem, *rest[1:]]
        if program == 'make':
            assert set(rest) <= set(targets)
        elif program == 'mmkd':
            assert rest[0] in COMMANDS
            args = parse(rest[0], rest[1:], monkeypatch)
            if str(getattr(args, 'config', '')).startswith(('configs/', 'mmkd::')):
                monkeypatch.chdir(ROOT)
                for entry in cli.read_config(args).model.get('distillers', {}).values():
                    build_distiller(entry)
        elif program != 'python' or rest[0] != 'demo/run.py':
            assert block.why_not or block.page == 'docs/extend.md', f'{words}: say why it is not run'


@pytest.mark.parametrize('page', NAMES)
def test_inline_commands_are_there(page):
    for words in re.findall(r'`mmkd ([a-z]\w*)', (ROOT / page).read_text()):
        assert words in COMMANDS, words


@pytest.mark.parametrize('page', NAMES)
def test_links_lead_to_files(page):
    """On GitHub; the site's are checked by `make docs`, with their anchors."""
    for link in re.findall(r'\]\(([^)\s]+)\)', (ROOT / page).read_text()):
        if '://' not in link and not link.startswith('#'):
            assert ((ROOT / page).parent / link.partition('#')[0]).exists(), link


def own_classes(registry):
    return {
        f'{each.__module__}.{each.__name__}'
        for each in registry.module_dict.values()
        if each.__module__.startswith('mmkd.')
    }


def test_the_api_has_every_method_and_every_source():
    """And each name on the page is there."""
    named = set(re.findall(r'^::: (\S+)', (ROOT / 'docs/api.md').read_text(), re.MULTILINE))
    assert own_classes(DISTILLERS) | own_classes(SOURCES) <= named
    for name in named:
        module, _, last = name.rpartition('.')
        assert hasattr(import_module(module), last) or import_module(name), name


def test_versions_agree():
    """Those of ruff, in all places that name one, and mmkd's own."""
    pinned = re.search(r'^ruff==(\S+)', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)[1]
    assert f'rev: v{pinned}\n' in (ROOT / '.pre-commit-config.yaml').read_text()
    assert f'ruff=={pinned}\n' in (ROOT / 'docs' / 'requirements.txt').read_text()
    assert f'version: {mmkd.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
    assert f'## {mmkd.__version__}' in (ROOT / 'CHANGELOG.md').read_text()
