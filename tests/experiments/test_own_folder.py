"""tools/compare.py on configs and data of one's own: through the real Runner, and in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmkd.testing import detectors, segmentors
from mmkd.testing.runs import shapes_config, streets_config

ROOT = Path(__file__).parents[2]


def compare(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'compare.py'), *map(str, arguments)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
