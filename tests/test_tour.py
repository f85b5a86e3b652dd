"""demo/tour.ipynb, cell by cell, without a notebook's server."""

import json
from pathlib import Path

import matplotlib
import pytest

BOOK = Path(__file__).parents[1] / 'demo' / 'tour.ipynb'


@pytest.mark.slow
def test_all_cells_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use('agg')
    cells = [each for each in json.loads(BOOK.read_text())['cells'] if each['cell_type'] == 'code']
    assert all(each['outputs'] for each in cells[2:])  # it was run before it was committed
    names: dict = {}
    for number, each in enumerate(cells):
        source = ''.join(each['source'])
        for whole, short in ((300, 30), (150, 4)):
            source = source.replace(f'(teacher, {whole})', f'(teacher, {short})')
            source = source.replace(f'(model, {whole})', f'(model, {short})').replace(
                f'(plain, {whole})', f'(plain, {short})'
            )
        exec(compile(source, f'cell {number}', 'exec'), names)
    assert 'teacher: mIoU ' in capsys.readouterr().out
    assert len(names['distilled']) == len(names['alone']) == 4
    assert names['alone'][0]['decode.loss_ce'] == names['distilled'][0]['decode.loss_ce']
