"""A segmentation user needs no mmdet."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_core_and_segmentation_import_without_mmdet():
    script = """
import sys
class NoMmdet:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('mmdet', 'pycocotools'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoMmdet())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'mmdet' else find_spec(name, *rest)
import mmkd.distill
from mmkd.registry import DISTILLERS
assert {'CWD', 'SKD', 'DAKD'} <= set(DISTILLERS.module_dict) and 'GID' not in DISTILLERS.module_dict
assert 'mmdet' not in sys.modules
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', script], check=True)
