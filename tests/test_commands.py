"""``mmkd COMMAND``: every tool by one name, in the package itself."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmkd import __main__ as mmkd
from mmkd import __version__

ROOT = Path(__file__).parents[1]


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['mmkd', *arguments])
    mmkd.main()


def test_the_commands_are_the_modules_of_the_package():
    modules = {each.stem for each in (ROOT / 'mmkd' / 'commands').glob('[a-z]*.py')}
    assert set(mmkd.COMMANDS) == modules


@pytest.mark.parametrize('name', sorted(set(mmkd.COMMANDS) - {'inspect'}))  # there it would hide Python's own module
def test_a_tool_of_a_checkout_is_the_command(name):
    script = (ROOT / 'tools' / f'{name}.py').read_text()
    assert f'from mmkd.commands.{name} import main\n' in script
    assert callable(import_module(f'mmkd.commands.{name}').main)


@pytest.mark.parametrize('name', mmkd.COMMANDS)
def test_a_command_has_its_own_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, name, '--help')
    assert end.value.code == 0
    assert f'usage: mmkd {name} ' in capsys.readouterr().out


def test_without_a_command_the_help_lists_all(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch)
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f'  {name} ' in said for name in mmkd.COMMANDS)


def test_a_command_that_is_not_there_is_one_line_with_all(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, 'trian', 'c.py')
    assert end.value.code == 2
    assert "'trian'" in capsys.readouterr().err.splitlines()[-1]


def test_python_m_mmkd_is_the_same():
    printed = subprocess.run([sys.executable, '-m', 'mmkd', '--version'], capture_output=True, text=True, check=True)
    assert printed.stdout == f'mmkd {__version__}\n'
