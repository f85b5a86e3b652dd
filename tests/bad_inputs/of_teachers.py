"""Teachers and other sources, and what the student inherits."""

from pathlib import Path

import torch
from table import Accepted, Case

from mmkd.testing import detectors, models


def teacher(name: str, options: str, expected, **more) -> Case:
    return Case(name, expected, f'model = dict(teacher=dict({options}))', **more)


def several(name: str, options: str, expected, distiller: str = '', **more) -> Case:
    """Several sources by name, in place of the one teacher."""
    text = f'model = dict(teacher=dict(_delete_=True, {options}), distillers=dict(cwd=dict({distiller})))'
    return Case(name, expected, text, **more)


def inherit(name: str, parts: str, expected, **more) -> Case:
    return Case(name, expected, f'model = dict(inherit={parts})', **more)


def content(value: bytes):
    """A file of these bytes as the checkpoint of the teacher."""

    def write(folder: Path) -> None:
        (folder / 'other.pth').write_bytes(value)

    return write


def weights(change):
    """A checkpoint that was changed."""

    def write(folder: Path) -> None:
        torch.save(change(torch.load(folder / 'teacher.pth', weights_only=True)), folder / 'other.pth')

    return write


def truncated(folder: Path) -> None:
    whole = (folder / 'teacher.pth').read_bytes()
    (folder / 'other.pth').write_bytes(whole[: len(whole) // 2])


def without(state: dict) -> dict:
    return {name: value for name, value in state['state_dict'].items() if not name.startswith('neck')}


def renamed(state: dict) -> dict:
    names = ('cross', 'ring', 'star', 'triangle', 'square', 'circle')
    return dict(state, meta=dict(dataset_meta=dict(classes=names)))


def other_classes(folder: Path) -> None:
    models.save_weights(detectors.retinanet(classes=3, channels=24, base=12), folder / 'other.pth')


OTHER = "checkpoint='other.pth'"
FROM_FILE = "config='teacher.py'"
LARGE = "large=dict(config='teacher.py', checkpoint='teacher.pth')"

CASES = [
    Case(
        'none at all',
        r'model: distill needs teacher|model.teacher: missing',
        "model = dict(_delete_=True, type='mmkd.Distill', student=dict(type='RetinaNet'), "
        "distillers=dict(a=dict(type='AT', layer='neck')))",
    ),
    Case('None', r'model.teacher: missing, or empty', 'model = dict(teacher=None)'),
    Case('an empty dict', r'model.teacher: missing, or empty', 'model = dict(teacher=dict(_delete_=True))'),
    Case('a number', r'model.teacher=5|teacher=5', 'model = dict(teacher=5)'),
    Case('a list', r'teacher=\[.*: expected', "model = dict(teacher=['a', 'b'])"),
    Case('a checkpoint alone', r'teacher config teacher.pth: not a config', "model = dict(teacher='teacher.pth')"),
    Case(
        'a config alone, without weights',
        r'model.teacher: no checkpoint for RetinaNet; a teacher needs trained weights',
        "model = dict(teacher='teacher.py')",
    ),
    Case(
        'a name with a typo', r'mmdet has no such config', "model = dict(teacher='mmdet::retinanet/retinanet_r101.py')"
    ),
    Case(
        'a package that is not installed', r"package 'mmpose' is not installed", "model = dict(teacher='mmpose::x.py')"
    ),
    Case(
        'a name without ::',
        r'teacher config mmdet/retinanet_r101.py: no such file',
        "model = dict(teacher='mmdet/retinanet_r101.py')",
    ),
    teacher('a config that is not there', "config='nothere.py'", r'teacher config nothere.py: no such file'),
    teacher(
        'a config with a mistake',
        "config='wrong.py'",
        r'teacher config wrong.py, line 1: NameError',
        files=lambda folder: (folder / 'wrong.py').write_text('model = x\n'),
    ),
    teacher(
        'a config without a model',
        "config='empty.py'",
        r'model of .*empty.py: expected a model',
        files=lambda folder: (folder / 'empty.py').write_text('a = 1\n'),
    ),
    teacher(
        'a checkpoint that is not there',
        "checkpoint='nothere.pth'",
        r'teacher checkpoint nothere.pth: no such file \(looked in',
    ),
    teacher('a checkpoint that is a folder', "checkpoint='data'", r'teacher checkpoint data: no such file'),
    teacher('a checkpoint that is a number', 'checkpoint=5', r'checkpoint=5: expected'),
    teacher('no checkpoint', 'checkpoint=None', r'model.teacher: no checkpoint for RetinaNet'),
    teacher('an empty file', OTHER, r'teacher checkpoint other.pth: ', files=content(b'')),
    teacher(
        'a web page',
        OTHER,
        r'teacher checkpoint other.pth: is no checkpoint of PyTorch, or damaged',
        files=content(b'<!doctype html><html></html>'),
    ),
    teacher(
        'a pointer of Git LFS',
        OTHER,
        r'teacher checkpoint other.pth: ',
        files=content(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'),
    ),
    teacher(
        'half a file', OTHER, r'teacher checkpoint other.pth: cannot be read, it may be truncated', files=truncated
    ),
    teacher('an image', OTHER, r'teacher checkpoint other.pth: ', files=content(b'\x89PNG\r\n\x1a\n' + bytes(64))),
    teacher(
        'no weights in it',
        OTHER,
        r'teacher checkpoint other.pth: holds no weights',
        files=weights(lambda state: dict(epoch=3)),
    ),
    teacher(
        'a list of tensors',
        OTHER,
        r'teacher checkpoint other.pth: holds no weights',
        files=weights(lambda state: [torch.zeros(1)]),
    ),
    teacher(
        'without a part of the weights', OTHER, r'does not fit RetinaNet: \d+ missing \(neck', files=weights(without)
    ),
    teacher(
        'weights below another name',
        OTHER,
        r'does not fit RetinaNet: \d+ missing',
        files=weights(lambda state: {f'module.{name}': value for name, value in state['state_dict'].items()}),
    ),
    teacher(
        'the weights of the student',
        "checkpoint='student.pth'",
        r'teacher checkpoint student.pth does not fit RetinaNet: \d+ of another shape',
    ),
    teacher(
        'the same classes in another order',
        OTHER,
        r"model.teacher's checkpoint other.pth: class 0 is 'cross', and 'circle'",
        files=weights(renamed),
    ),
    teacher('a key with a typo', "ckpt='x'", r"teacher: Teacher has no option 'ckpt'; the nearest are 'checkpoint'"),
    teacher('a type with a typo', "type='Teachr'", r"teacher: there is no source 'Teachr'; the nearest are 'Teacher'"),
    teacher('a precision with a typo', "dtype='fp16'", r"dtype='fp16': expected 'float16', 'bfloat16' or None"),
    teacher('an interval of 0', 'interval=0', r'interval=0: expected a whole number of at least 1'),
    teacher('an interval that is a string', "interval='2'", r"teacher: interval='2': expected a whole number"),
    teacher('an end before the begin', 'begin=5, end=5', r'end=5: expected a whole number of at least 6'),
    teacher(
        'a config of another backbone',
        'config=dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))',
        r'teacher checkpoint teacher.pth does not fit RetinaNet: \d+ of another shape',
    ),
    teacher(
        'a model that its own class refuses',
        'config=dict(backbone=dict(depth=19))',
        r'teacher: config: RetinaNet cannot be built; KeyError: invalid depth 19 for resnet',
    ),
    teacher(
        'a model without a type',
        'config=dict(_delete_=True, backbone=dict())',
        r'model.teacher.config: it names no class',
    ),
    teacher(
        'other classes, for logits',
        f"config='teacher3.py', {OTHER}",
        r'puts out logits of 6 classes, .* of the teacher of 3',
        files=lambda folder: (
            other_classes(folder),
            (folder / 'teacher3.py').write_text("_base_ = 'teacher.py'\nmodel = dict(bbox_head=dict(num_classes=3))\n"),
        ),
    )._replace(
        text="model = dict(teacher=dict(_delete_=True, config='teacher3.py', checkpoint='other.pth'), "
        "distillers=dict(cwd=dict(layer='bbox_head.retina_cls')))"
    ),
    several(
        'several, and none is named',
        f'{LARGE}, mean=dict(type="Average")',
        r'distillers.cwd: there are several teachers, large, mean; name one',
    ),
    several(
        'one that does not exist is named',
        f'{LARGE}, mean=dict(type="Average")',
        r"distillers.cwd: teacher='big': there is none; there are large, mean",
        "teacher='big'",
    ),
    several(
        'two for a method that takes one',
        f'{LARGE}, mean=dict(type="Average")',
        Accepted('it learns from their mean'),
        "teacher=['large', 'mean']",
    ),
    several(
        'a name with a dot',
        '**{"a.b": dict(config="teacher.py", checkpoint="teacher.pth")}',
        r'teacher.a.b: a name starts the log keys',
    ),
    several(
        'a name with loss',
        'loss_teacher=dict(config="teacher.py", checkpoint="teacher.pth")',
        r"teacher.loss_teacher: a name starts the log keys and must not contain 'loss'",
    ),
    several(
        'a name that a distiller has',
        'cwd=dict(config="teacher.py", checkpoint="teacher.pth")',
        r'distillers.cwd: a teacher has this name',
    ),
    several(
        'an average with a momentum of 1',
        'mean=dict(type="Average", momentum=1.0)',
        r'momentum=1.0: expected a number of at least 0 and below 1',
    ),
    several(
        'an average with a momentum of NaN',
        'mean=dict(type="Average", momentum=float("nan"))',
        r'momentum=nan: expected',
    ),
    several('snapshots without a cycle', 'before=dict(type="Snapshot")', r'teacher.before: Snapshot needs cycle'),
    several('snapshots of no steps', 'before=dict(type="Snapshot", cycle=0)', r'cycle=0: expected a whole number'),
    several(
        'an average of another model',
        'mean=dict(type="Average", config="teacher.py")',
        r"Average has no option 'config'",
    ),
    several('a peer without a config', 'peer=dict(type="Peer")', r'teacher.peer: Peer needs config'),
    several(
        'a peer with weights that are not there',
        'peer=dict(type="Peer", config="teacher.py", checkpoint="x.pth")',
        r'model.teacher.peer.checkpoint x.pth: no such file',
    ),
    several(
        'the student as its own teacher in the same layer',
        'own=dict(type="Own")',
        r"layer 'neck' would be compared with itself",
    ),
    several('a student that is filled in', 'own=dict(type="Own", student="x")', r'student is filled in'),
    several(
        'a learner that is not trained',
        f'{LARGE}, own=dict(type="Own")',
        r"learner='large' is not trained; a Peer is",
        "teacher='own', learner='large'",
    ),
    inherit('a string', "'neck'", r"inherit='neck': expected a list of parts"),
    inherit(
        'a part that is not there',
        "['neckk']",
        r"inherit: layer 'neckk': RetinaNet has no such module; the nearest are 'neck'",
    ),
    inherit(
        'a part of other shapes', "['neck']", r'inherit: neck\..* is \(.*\) in the student and \(.*\) in the teacher'
    ),
    inherit('a number', '3', r'inherit=3: expected'),
    inherit(
        'a teacher that is not there',
        "dict(large=['neck'])",
        r'inherit.large: there is no such frozen teacher; there are teacher',
    ),
    inherit('a list of numbers', '[1]', r'inherit: layer 1: expected'),
    # what is right
    teacher(
        'the config of a file',
        f'_delete_=True, {FROM_FILE}, checkpoint="teacher.pth"',
        Accepted('a config may be named'),
    ),
    teacher('in half precision', "dtype='bfloat16'", Accepted('a CPU has it')),
    teacher(
        'a checkpoint of weights alone',
        OTHER,
        Accepted('a state_dict may stand alone'),
        files=weights(lambda state: state['state_dict']),
    ),
    inherit('nothing', '[]', Accepted('as without it')),
    Case(
        'other classes, for features',
        Accepted('features have no classes'),
        "model = dict(teacher=dict(_delete_=True, config='teacher3.py', checkpoint='other.pth'))",
        files=lambda folder: (
            other_classes(folder),
            (folder / 'teacher3.py').write_text("_base_ = 'teacher.py'\nmodel = dict(bbox_head=dict(num_classes=3))\n"),
        ),
    ),
]
