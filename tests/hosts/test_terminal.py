"""What a person at a terminal sees of a training."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from mmkd.hosts.terminal import Readable
from mmkd.testing import detectors
from mmkd.testing.runs import distilled, shapes_config

LINE = (
    'Iter(train) [  50/600]  base_lr: 1.0000e-02 lr: 1.3469e-03  eta: 1 day, 0:04:12  time: 0.4640  memory: 512  '
    'grad_norm: 8.9096  loss: 3.4235  loss_cls: 0.9556  decode.loss_ce: 0.6460  decode.acc_seg: 55.1  gid.loss_feature: 0.4  '
    'gid.loss_relation: 0.2  gid.instances: 10.0000  cwd.loss: 1.2219  share.task: 0.4844'
)


def formatted(message, level=logging.INFO):
    stock = logging.Formatter('stock %(message)s')
    record = logging.LogRecord('mmengine', level, 'file.py', 1, message, None, None)
    return Readable(stock, ['gid', 'cwd']).format(record)


def test_a_line_of_a_training_has_task_and_methods_apart():
    time, _, rest = formatted(LINE).partition(' ')
    assert time.count(':') == 2
    assert rest == (
        'iter    50/600  loss 3.424 = task 1.602 + gid 0.6 + cwd 1.222  lr 0.00135  0.46 s  eta 1 day, 0:04:12'
    )


def test_of_epochs_and_of_a_plain_model():
    line = 'Epoch(train)   [2][ 100/7330]  lr: 1.0000e-02  eta: 5:00:00  time: 0.2  loss: 1.5  loss_cls: 1.0  loss_bbox: 0.5'
    assert formatted(line).partition(' ')[2] == 'epoch 2 100/7330  loss 1.5  lr 0.01  0.20 s  eta 5:00:00'


def test_long_messages_are_in_the_file_and_warnings_are_whole():
    dashes = '-' * 60
    assert formatted(f'\n{dashes}\nSystem:\n a\n b\n c\n{dashes}\n').endswith(' System: (4 lines, in the log file)')
    assert formatted('Config:\na = 1\nb = 2\nc = 3\nd = 4').endswith('Config: (5 lines, in the log file)')
    assert formatted('a\nb\nc\nd\ne', logging.WARNING) == 'stock a\nb\nc\nd\ne'
    assert formatted('Saving checkpoint at 20 iterations').partition(' ')[2] == 'Saving checkpoint at 20 iterations'


@pytest.mark.slow
def test_a_terminal_gets_lines_and_the_file_all(tmp_path):
    methods = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))
    shapes_config(tmp_path, distilled(tmp_path, methods, detectors.retinanet(classes=6))).dump(tmp_path / 'config.py')
    ours, theirs = pty.openpty()
    command = [sys.executable, '-m', 'mmkd', 'train', str(tmp_path / 'config.py'), '--no-check']
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        said = b''
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            said += part
    os.close(ours)
    assert process.returncode == 0
    lines = said.decode().splitlines()
    steps = [line for line in lines if ' iter ' in line and ' = task ' in line]
    assert len(steps) == 4
    assert all('gid ' in line and 'cwd ' in line and 'eta ' in line and len(line) <= 120 for line in steps)
    assert any('Config: (' in line for line in lines)
    (log,) = (tmp_path / 'work').glob('*/*.log')
    assert 'gid.loss_relation' in log.read_text()
    assert 'optim_wrapper' in log.read_text()
