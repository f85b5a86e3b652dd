"""Checkpoints that a training goes on from or begins with, damaged and hostile ones among them."""

import os
import pickle
import zipfile
from pathlib import Path

import torch
from table import Accepted, Case

EXECUTED = 'executed'
"""What a hostile file would make."""


class Payload:
    def __reduce__(self):
        return os.mkdir, (EXECUTED,)


def resume(name: str, expected, write=None, *names: str, **more) -> Case:
    """``--resume``, with the name of a checkpoint or without."""
    return Case(name, expected, options=('--resume', *names), files=write, **more)


def start(name: str, expected, write, **more) -> Case:
    """A checkpoint that ``load_from`` names."""
    return Case(name, expected, "load_from = 'x.pth'", files=write, **more)


def content(value: bytes, name: str = 'x.pth'):
    def write(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(value)

    return write


def saved(change, name: str = 'x.pth'):
    """What ``change`` makes of a training's checkpoint."""

    def write(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        torch.save(change(torch.load(place / 'run.pth', weights_only=True)), place / name)

    return write


def cut(name: str):
    def write(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        whole = (place / 'run.pth').read_bytes()
        (place / name).write_bytes(whole[: len(whole) // 2])

    return write


def compressed(place: Path) -> None:
    with (
        zipfile.ZipFile(place / 'run.pth') as read,
        zipfile.ZipFile(place / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as write,
    ):
        for each in read.infolist():
            write.writestr(each.filename, read.read(each))


def hostile(change=lambda state: dict(state, extra=Payload()), name: str = 'x.pth', legacy: bool = False):
    def write(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        state = change(torch.load(place / 'run.pth', weights_only=True))
        torch.save(state, place / name, _use_new_zipfile_serialization=not legacy)

    return write


def bare(place: Path) -> None:
    (place / 'x.pth').write_bytes(pickle.dumps(Payload()))


def without(*keys: str):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def invalid(state: dict) -> dict:
    name = next(iter(state['state_dict']))
    state['state_dict'][name] = torch.full_like(state['state_dict'][name], float('nan'))
    return state


def all_of(*writes):
    def write(place: Path) -> None:
        for each in writes:
            each(place)

    return write


def record(value: bytes):
    return content(value, 'work/last_checkpoint')


X = ('x.pth',)

CASES = [
    resume('a checkpoint that is not there', r'--resume x.pth: no such file', None, *X),
    resume('a folder', r'--resume data: no such file|--resume data: ', None, 'data'),
    resume('a config', r'--resume base.py: ', None, 'base.py'),
    resume('an empty file', r'--resume x.pth: cannot be read', content(b''), *X),
    resume('a web page', r'--resume x.pth: is no checkpoint of PyTorch', content(b'<!doctype html>'), *X),
    resume('half a file', r'--resume x.pth: cannot be read, it may be truncated', cut('x.pth'), *X),
    resume(
        'an image',
        r'--resume x.pth: (refused|cannot be read|is no checkpoint)',
        content(b'\x89PNG\r\n\x1a\n' + bytes(64)),
        *X,
    ),
    resume('a compressed archive', r'--resume x.pth: cannot be read, .* is compressed', compressed, *X),
    resume(
        'weights alone',
        r'--resume x.pth: holds weights but no state of a training',
        saved(lambda state: state['state_dict']),
        *X,
    ),
    resume('no optimizer', r'it lacks optimizer\); start a new one', saved(without('optimizer')), *X),
    resume('no meta', r'it lacks meta', saved(without('meta')), *X),
    resume('no history', r'it lacks message_hub', saved(without('message_hub')), *X),
    resume('no iteration', r'it lacks meta.iter', saved(lambda state: dict(state, meta={})), *X),
    resume('no weights', r'--resume x.pth: holds no weights', saved(lambda state: dict(state, state_dict={})), *X),
    resume('weights of NaN', r'--resume x.pth: \S+ holds NaN or infinite values', saved(invalid), *X),
    resume(
        'another model',
        r'--resume: x.pth is of another training: \d+ weights differ',
        saved(lambda state: dict(state, state_dict={'a': torch.zeros(2)})),
        *X,
    ),
    resume('a list', r'--resume x.pth: holds no weights', saved(lambda state: [state]), *X),
    resume('a payload beside the weights', r'--resume x.pth: refused, it holds code', hostile(), *X),
    resume(
        'a payload in the meta',
        r'--resume x.pth: refused',
        hostile(lambda state: dict(state, meta=dict(epoch=0, iter=1, a=Payload()))),
        *X,
    ),
    resume(
        'a payload in the optimizer',
        r'--resume x.pth: refused',
        hostile(lambda state: dict(state, optimizer=Payload())),
        *X,
    ),
    resume(
        'a payload in the legacy format',
        r'--resume x.pth: (refused|cannot be read|is no checkpoint)',
        hostile(legacy=True),
        *X,
    ),
    resume('a bare pickle', r'--resume x.pth: (refused|cannot be read|is no checkpoint)', bare, *X),
    resume('a pipe', r'--resume x.pth: (no such file|is not a file)', lambda place: os.mkfifo(place / 'x.pth'), *X),
    resume(
        'a link to itself', r'--resume x.pth: no such file', lambda place: (place / 'x.pth').symlink_to('x.pth'), *X
    ),
    resume(
        'the last one is cut off, and there is no other',
        r'work has no checkpoint that can be read',
        cut('work/iter_4.pth'),
    ),
    resume(
        'the last one is hostile, and there is no other',
        r'work has no checkpoint that can be read',
        hostile(name='work/iter_4.pth'),
    ),
    resume(
        'the record names a hostile file',
        r'work has no checkpoint that can be read',
        all_of(hostile(name='work/evil.pth'), record(b'work/evil.pth')),
    ),
    start('a payload to begin with', r'load_from x.pth: refused', hostile()),
    start(
        'a payload to begin with, in the legacy format',
        r'load_from x.pth: (refused|cannot be read|is no checkpoint)',
        hostile(legacy=True),
    ),
    start('a bare pickle to begin with', r'load_from x.pth: (refused|cannot be read|is no checkpoint)', bare),
    start('half a file to begin with', r'load_from x.pth: cannot be read, it may be truncated', cut('x.pth')),
    start('weights of NaN to begin with', r'load_from x.pth: \S+ holds NaN or infinite values', saved(invalid)),
    start(
        'a pipe to begin with',
        r'load_from x.pth: (no such file|is not a file)',
        lambda place: os.mkfifo(place / 'x.pth'),
    ),
    Case(
        'a payload as the teacher',
        r'teacher checkpoint x.pth: refused',
        "model = dict(teacher=dict(checkpoint='x.pth'))",
        files=hostile(),
    ),
    Case(
        'a bare pickle as the teacher',
        r'teacher checkpoint x.pth: (refused|cannot be read|is no checkpoint)',
        "model = dict(teacher=dict(checkpoint='x.pth'))",
        files=bare,
    ),
    Case(
        'weights of NaN as the teacher',
        r'teacher checkpoint x.pth: \S+ holds NaN',
        "model = dict(teacher=dict(checkpoint='x.pth'))",
        files=saved(invalid),
    ),
    Case(
        'a payload to test', r'checkpoint x.pth: refused', files=hostile(), tool='test', arguments=('base.py', 'x.pth')
    ),
    Case(
        'a bare pickle to test',
        r'checkpoint x.pth: (refused|cannot be read|is no checkpoint)',
        files=bare,
        tool='test',
        arguments=('base.py', 'x.pth'),
    ),
    Case(
        'a payload to export',
        r'checkpoint x.pth: refused',
        files=hostile(),
        tool='export',
        arguments=('base.py', 'x.pth', 'out'),
    ),
    Case(
        'a payload to export, in the legacy format',
        r'checkpoint x.pth: (refused|cannot be read|is no checkpoint)',
        files=hostile(legacy=True),
        tool='export',
        arguments=('base.py', 'x.pth', 'out'),
    ),
    Case(
        'a training with another optimizer',
        r'--resume: run.pth is of another training',
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=0.1))",
        options=('--resume', 'run.pth'),
    ),
    Case(
        'a training of another distiller',
        r'--resume: run.pth is of another training: \d+ weights differ, distillers',
        "model = dict(distillers=dict(cwd=dict(adapter=dict(type='ConvAdapter', kernel_size=3))))",
        options=('--resume', 'run.pth'),
    ),
    Case(
        'a training of a student of other widths',
        r'--resume: run.pth is of another training: \d+ weights differ',
        'model = dict(student=dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128])))',
        options=('--resume', 'run.pth'),
    ),
    # what is right
    resume('an empty work directory', Accepted('a job may be submitted so each time; a warning says so')),
    resume('a record of nothing', Accepted('there is nothing to go on from; a warning says so'), record(b'')),
    resume('a record of rubbish', Accepted('there is nothing to go on from; a warning says so'), record(b'\0\xff')),
    resume(
        'a record of what was moved',
        Accepted('it is found beside the record'),
        all_of(saved(dict, 'work/iter_4.pth'), record(b'/elsewhere/iter_4.pth')),
    ),
    resume(
        'the last one is cut off',
        Accepted('the one before is taken; a warning says so'),
        all_of(saved(dict, 'work/iter_2.pth'), cut('work/iter_4.pth'), record(b'work/iter_4.pth')),
    ),
    resume('one that fits', Accepted('as it should be'), None, 'run.pth'),
]
