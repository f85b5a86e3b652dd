"""model-index.yml: what `mim search mmkd` and mmengine find of the configs."""

import re
from pathlib import Path

import pytest
from mmengine.fileio import load

ROOT = Path(__file__).parents[1]
IMPORTS = load(ROOT / 'model-index.yml')['Import']
METAFILE = load(ROOT / 'configs' / 'metafile.yml')
MODELS = {each['Name']: each for each in METAFILE['Models']}


def test_it_lists_every_full_size_config_once():
    assert IMPORTS == ['configs/metafile.yml']
    assert len(MODELS) == len(METAFILE['Models'])
    assert sorted(MODELS) == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def test_it_lies_where_mim_looks():
    inside = ROOT / 'mmkd' / '.mim'
    for path in ('model-index.yml', 'configs/metafile.yml', 'tools/train.py', 'tools/test.py'):
        assert (inside / path).samefile(ROOT / path)


@pytest.mark.parametrize('name', MODELS)
def test_its_entries_are_those_of_the_table_and_of_the_config(name):
    """And claim no figure that the table has not."""
    entry = MODELS[name]
    assert entry['Config'] == f'configs/{name}.py'
    host = 'mmseg' if entry['Results'][0]['Dataset'] == 'Cityscapes' else 'mmdet'
    assert f"'{host}::" in (ROOT / entry['Config']).read_text()
    (row,) = [line for line in (ROOT / 'configs/README.md').read_text().splitlines() if f']({name}.py)' in line]
    plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', row).replace('→', '->')
    cells = [cell.strip() for cell in plain.strip('|').split('|')]
    metadata = entry['Metadata']
    assert (metadata['Pair'], metadata.get('Reported', 'not known')) == (cells[3], cells[4])
    assert metadata.get('Reported By', cells[5]) == cells[5]
    assert all(not result['Metrics'] for result in entry['Results'])
    collection = next(each for each in METAFILE['Collections'] if each['Name'] == entry['In Collection'])
    page = ROOT / collection['README']
    assert name.startswith(f'{page.stem}_') or page.name == 'schemes.md'
    assert ' '.join(collection['Paper']['Title'].split()) in ' '.join(page.read_text().split())
