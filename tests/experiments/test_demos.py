"""What the demos train, and the segmentation demo's pictures."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from mmkd.data.streets import CLASSES, IGNORED
from mmkd.experiments.demos import TASKS, import_module, segmentation
from mmkd.experiments.demos.segmentation import PALETTE, Validation
from mmkd.experiments.pictures import colored, mistakes


@pytest.mark.parametrize('task', TASKS)
def test_a_demo_trains_its_teacher_and_each_student_with_each_seed(task, tmp_path):
    demo = import_module(f'mmkd.experiments.demos.{task}').DEMO
    teacher, students = demo.runs([0, 5], tmp_path)
    assert teacher.length == 1500
    assert list(students) == list(demo.students)
    for name, runs in students.items():
        assert [run.read().randomness.seed for run in runs] == [0, 5]
        for run in runs:
            assert run.length == 600
            assert run.folder == tmp_path / f'{demo.students[name]}_seed{run.read().randomness.seed}'
            if name != 'student alone':
                assert run.read().model.teacher.checkpoint == str(teacher.checkpoint)


def test_mistakes_are_red_and_ignored_pixels_black():
    labels = np.array([[0, 1, IGNORED]])
    picture = mistakes(np.full((1, 3, 3), 100, np.uint8), labels, np.array([[0, 2, 2]]))
    assert picture[0].tolist() == [[190, 190, 190], [200, 30, 30], [0, 0, 0]]
    assert colored(labels, PALETTE, IGNORED)[0].tolist() == [[128, 64, 128], [244, 35, 232], [0, 0, 0]]


def test_the_class_table_has_the_models_iou_and_the_pictures_are_not_blank(monkeypatch):
    validation = Validation.__new__(Validation)
    labels = torch.zeros(4, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    labels[0] = IGNORED
    half = labels.clone()
    half[:2, 4:] = 0  # one row of class 1 that counts is called 0
    half[0] = 3
    validation.images = [np.full((4, 8, 3), 90, np.uint8)] * 2
    validation.labels = [labels] * 2
    validation.predicted = {'teacher': [labels.clamp(max=18)] * 2, 'student alone': [half] * 2}
    table = {row['class']: row for row in validation.class_table()}
    assert list(table) == [*CLASSES, 'mean']
    assert (table['road']['teacher'], table['road']['student alone']) == ('100.0', '75.0')
    assert (table['sidewalk']['student alone'], table['mean']['teacher']) == ('66.7', '100.0')
    monkeypatch.setattr(segmentation, 'PICTURES', 2)
    kind, _, content = validation.pictures().partition(',')
    assert kind == 'data:image/png;base64'
    picture = plt.imread(io.BytesIO(base64.b64decode(content)), format='png')
    assert (picture[..., :3] == np.array([200, 30, 30], np.float32) / 255).all(-1).mean() > 0.01


@pytest.mark.slow
def test_a_segmentation_user_needs_no_mmdet():
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
from mmkd.experiments import comparison, discovery, label_maps, run_report
from mmkd.experiments.demos import segmentation
assert len(discovery.discover(segmentation.DEMO.suite.configs)) > 8
assert 'mmdet' not in sys.modules
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', script], check=True)
