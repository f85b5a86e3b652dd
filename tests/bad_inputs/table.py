"""The form of the tables of bad inputs, and how one is tried."""

import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from tool import UNSCORED

ROOT = Path(__file__).parents[2]


class Accepted(NamedTuple):
    """What is no mistake, and why."""

    reason: str


class Case(NamedTuple):
    """One input."""

    name: str
    expected: str | Accepted
    """A regular expression of the one line that is printed."""
    text: str = ''
    """A config's lines, after those of the base config."""
    options: Sequence[str] = ()
    """More arguments of the tool."""
    files: Callable[[Path], Any] | None = None
    """What is written to the folder before: the working directory, which has ``base.py``, ``data`` and ``teacher.pth``."""
    tool: str = 'train'
    base: str = 'base.py'
    arguments: Sequence[str] | None = None
    """The tool's arguments in place of ``config.py`` and ``options``."""


class WithoutRunner:
    """In place of mmengine's Runner: what it builds before the first iteration, and the first batch, in a tenth of the time."""

    def __init__(self, config: Config):
        self.cfg, self.hooks, self.world_size, self.visualizer = config, [], 1, SimpleNamespace()
        self._train_dataloader, self.seed, self.optim_wrapper = None, 0, config.get('optim_wrapper')
        self.test_evaluator = SimpleNamespace(metrics=[])
        self.logger = MMLogger.get_current_instance()
        self.scope = DefaultScope.overwrite_default_scope(config.get('default_scope'))
        with self.scope:
            model = config.model
            if config.get('data_preprocessor'):
                model.setdefault('data_preprocessor', config.data_preprocessor)
            self.model = MODELS.build(model)

    def register_hook(self, hook: Any) -> None:
        pass

    def build_optim_wrapper(self, wrapper: Any) -> Any:
        return build_optim_wrapper(self.model, wrapper) if isinstance(wrapper, dict) else wrapper

    def train(self) -> None:
        with DefaultScope.overwrite_default_scope(self.cfg.get('default_scope')):
            self.model.init_weights()
            self.build_optim_wrapper(self.optim_wrapper)
            loader = Runner.build_dataloader(self.cfg.train_dataloader, seed=0)
            batch = self.model.data_preprocessor(next(iter(loader)), True)
            loss, _ = self.model.parse_losses(self.model(**batch, mode='loss'))
            assert torch.isfinite(loss)

    def test(self) -> None:
        pass


def attempt(case: Case, capsys: Any, monkeypatch: Any) -> str:
    """Run a tool in this process and folder; the line it ends with, '' if it ends well."""
    if case.files is not None:
        case.files(Path())
    if case.text or case.arguments is None:
        Path('config.py').write_text(f"_base_ = '{case.base}'\n{case.text}\n" if case.base else case.text)
    arguments = ['config.py', *case.options] if case.arguments is None else list(case.arguments)
    if case.tool == 'train':
        arguments += UNSCORED
    monkeypatch.setattr(sys, 'argv', [f'{case.tool}.py', *arguments])
    monkeypatch.setattr('mmkd.cli.build_runner', WithoutRunner)
    monkeypatch.setattr('mmkd.cli.watch', lambda *_: None)
    main = runpy.run_path(str(ROOT / 'tools' / f'{case.tool}.py'))['main']
    code: Any = None
    try:
        main()
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    assert 'Traceback' not in printed.out + printed.err
    if isinstance(code, int) and code:  # argparse's, after the usage
        return printed.err.splitlines()[-1].partition(': ')[2]
    return code or ''


def check(case: Case, line: str) -> None:
    """Compare the line with the table."""
    if isinstance(case.expected, Accepted):
        assert line == ''
        return
    assert line.startswith('error: '), line or 'accepted'
    assert '\n' not in line
    assert re.search(case.expected, line), line
    assert 'shows the traceback' not in line, line  # it is a ConfigError, not what a library says


def coco(change: Callable[[dict], Any], split: str = 'train') -> Callable[[Path], None]:
    """A change of an annotation file's content, in place or returned."""

    def write(folder: Path) -> None:
        path = folder / 'data' / 'annotations' / f'{split}.json'
        content = json.loads(path.read_text())
        changed = change(content)
        content = changed if changed is not None else content
        path.unlink()
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    return write
