"""Checkpoints that people download: hostile or broken, none runs anything, none hangs, each gets one line."""

import io
import json
import os
import pickle
import pickletools
import signal
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from tool import tool

from mmkd import weights
from mmkd.errors import ConfigError
from mmkd.hosts.checkpoints import check_resumable
from mmkd.testing import detectors, models
from mmkd.testing.runs import distilled, shapes_config
from mmkd.weights import read_checkpoint, read_file

MARK = 'executed'


class Run:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Restored:
    """Pickles as an object whose state is handed to a function."""

    def __init__(self, function, state):
        self.function, self.state = function, state

    def __reduce__(self):
        return object.__new__, (Restored,), self.state, None, None, self.function


def touch():
    return f'touch {Path(MARK).absolute()}'


def python():
    return f"open({str(Path(MARK).absolute())!r}, 'w').close()"


# what runs something when it is unpickled without a check
PAYLOADS = {
    'os.system': lambda: Run(os.system, touch()),
    'eval': lambda: Run(eval, python()),
    'exec': lambda: Run(exec, python()),
    'open': lambda: Run(open, str(Path(MARK).absolute()), 'w'),
    'getattr': lambda: Run(getattr, Run(__import__, 'os'), 'system'),
    'import': lambda: Run(__import__, 'antigravity'),
    'popen': lambda: Run(os.popen, touch()),
    'torch.hub.load': lambda: Run(torch.hub.load, str(Path.cwd()), 'model', 'local'),
    'torch.load': lambda: Run(torch.load, 'other.pth', None, Run(__import__, 'pickle')),
    'nested pickle': lambda: Run(pickle.loads, pickle.dumps(Run(os.system, touch()))),
    'state setter': lambda: Restored(os.system, touch()),
    'numpy.load': lambda: Run(np.load, 'evil.npy', None, True),
}
# where it stands in what a training saves
PLACES = {
    'the whole file': lambda evil: evil,
    'a weight': lambda evil: dict(state_dict={'a': torch.zeros(2), 'b': evil}),
    'beside weights': lambda evil: {'a': torch.zeros(2), 'b': evil},
    'meta': lambda evil: dict(state_dict={'a': torch.zeros(2)}, meta=dict(epoch=0, iter=1, cfg=evil)),
    'optimizer': lambda evil: dict(state_dict={'a': torch.zeros(2)}, optimizer=dict(state={0: evil})),
    'message hub': lambda evil: dict(state_dict={'a': torch.zeros(2)}, message_hub=dict(log_scalars=dict(loss=evil))),
    'schedulers': lambda evil: dict(state_dict={'a': torch.zeros(2)}, param_schedulers=[evil]),
    'a tuple in a list': lambda evil: dict(state_dict={'a': torch.zeros(2)}, other=[(1, (evil,))]),
}
FORMATS = {'zip': dict(), 'legacy': dict(_use_new_zipfile_serialization=False)}


def raw_zip(path, pickled: bytes, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', pickled)
        archive.writestr('archive/version', '3\n')
        for name, content in entries.items():
            archive.writestr(f'archive/{name}', content)


def sound(path):
    torch.save(dict(state_dict={'a': torch.arange(64.0)}, meta=dict(epoch=0, iter=1)), path)
    return path


def cut(part):
    def make(path):
        content = sound(path).read_bytes()
        path.write_bytes(content[: int(len(content) * part)])

    return make


def legacy_cut(path):
    torch.save({'a': torch.arange(64.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(what):
    def make(path):
        content = bytearray(sound(path).read_bytes())
        content[content.index(what) + 1] ^= 0x40
        path.write_bytes(content)

    return make


def saved(content):
    return lambda path: torch.save(content, path)


def written(content):
    return lambda path: path.write_bytes(content)


def tarred(path):
    with tarfile.open(path, 'w') as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            content = pickle.dumps(Run(os.system, touch()))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def protocol_0(path):
    written(f"cos\nsystem\n(S'{touch()}'\ntR.".encode())(path)


def instance(path):
    written(f"(S'{touch()}'\nios\nsystem\n.".encode())(path)


def legacy_header(path):
    """The magic number and version of the old format, and then a call."""
    with open(path, 'wb') as file:
        for each in (torch.serialization.MAGIC_NUMBER, 1001, {}, Run(os.system, touch())):
            pickle.dump(each, file, 2)


def persistent(path):
    """A storage whose type is a function."""
    pickled = (
        pickletools.optimize(pickle.dumps(0, 2))[:-2] + b'(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000'
    )
    raw_zip(path, pickled + b'X\x03\x00\x00\x00cpuK\x01tQ.')


def allowed_abused(path):
    """numpy's reconstruction, which is allowed, of a class that is not."""
    torch.save(Run(np.ndarray.__reduce__(np.zeros(1))[0], Run, (0,), b'b'), path)


def history_abused(path):
    torch.save(Run(getattr, HistoryBuffer, '__init__'), path)


def compressed(path):
    """A gigabyte in a megabyte."""
    raw_zip(path, b'\x80\x02}.' + bytes(2**28), zipfile.ZIP_DEFLATED)


def overlapping(path):
    """Entries that all have the same bytes, so that they claim more than there are."""
    raw_zip(path, b'\x80\x02}q\x00.', **{'data/0': bytes(2**16)})
    content = path.read_bytes()
    start = content.index(b'PK\x01\x02')
    entries = content[start : content.index(b'PK\x05\x06')]
    end = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, 3 * 50, 3 * 50, len(entries) * 50, start, 0)
    path.write_bytes(content[:start] + entries * 50 + end)


def huge_tensor(path):
    """A tensor that claims more values than the file has bytes."""
    content = io.BytesIO()
    torch.save({'a': torch.zeros(3)}, content)
    with zipfile.ZipFile(content) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    name = next(each for each in names if each.endswith('data.pkl'))
    names[name] = names[name].replace(b'K\x03\x85', b'\x8a\x05\x00\x00\x00\x00\x40\x85')
    assert b'\x8a\x05' in names[name]
    with zipfile.ZipFile(path, 'w') as archive:
        for each, data in names.items():
            archive.writestr(each, data)


def huge_legacy_storage(path):
    torch.save({'a': torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    position = content.rindex(struct.pack('<q', 3))
    path.write_bytes(content[:position] + struct.pack('<q', 2**45) + content[position + 8 :])


def laughs(path):
    """Lists of lists, ten times two to the thirtieth entries if anybody counted them."""
    value = [0] * 10
    for _ in range(30):
        value = [value, value]
    raw_zip(path, pickle.dumps(value, 2))


def deep(path):
    written(b'\x80\x02' + b'(' * 10**5 + b'l' * 10**5 + b'.')(path)


def loop(path):
    path.symlink_to(path)


def unreadable_entry(path):
    raw_zip(path, b'\x80\x02.')


BROKEN = {
    'empty': written(b''),
    'one byte': written(b'\x80'),
    'zeros': written(bytes(4096)),
    'text': written(b'not a checkpoint\n' * 100),
    'html page': written(b'<!DOCTYPE html><html><body>404 Not Found</body></html>'),
    'git lfs pointer': written(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'),
    'json': written(json.dumps({'state_dict': {'a': [0]}}).encode()),
    'numpy': lambda path: np.save(path.open('wb'), np.zeros(3)),
    'numpy with objects': lambda path: np.save(path.open('wb'), np.array([Run(os.system, touch())], dtype=object)),
    'safetensors header': written(struct.pack('<Q', 2**60) + b'{"a":{"dtype":"F32"}}'),
    'pickle without torch': lambda path: path.write_bytes(pickle.dumps(Run(os.system, touch()))),
    'protocol 0': protocol_0,
    'protocol 0, instance': instance,
    'legacy header': legacy_header,
    'tar': tarred,
    'torchscript': lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path),
    'a whole model': lambda path: torch.save(torch.nn.Linear(1, 1), path),
    'storage of a function': persistent,
    'numpy reconstruction abused': allowed_abused,
    'history buffer abused': history_abused,
    'cut at a tenth': cut(0.1),
    'cut in the middle': cut(0.5),
    'cut before the end': cut(0.97),
    'legacy cut': legacy_cut,
    'bit flipped in a name': flipped(b'state_dict'),
    'bit flipped in the archive': flipped(b'PK\x01\x02'),
    'compressed archive': compressed,
    'overlapping entries': overlapping,
    'huge tensor': huge_tensor,
    'huge legacy storage': huge_legacy_storage,
    'empty pickle': unreadable_entry,
    'billion laughs': laughs,
    'deep nesting': deep,
    'no archive of torch': lambda path: zipfile.ZipFile(path, 'w').writestr('a.txt', 'b'),
    'list': saved([torch.zeros(2)]),
    'tensor': saved(torch.zeros(2)),
    'empty dict': saved({}),
    'strings for weights': saved(dict(state_dict={'a': 'b'})),
    'lists for weights': saved(dict(state_dict={'a': [1.0]})),
    'state_dict is a list': saved(dict(state_dict=[torch.zeros(2)])),
    'NaN': saved(dict(state_dict={'a': torch.tensor([0.0, float('nan')])})),
    'infinite': saved(dict(state_dict={'a': torch.tensor([0.0, float('inf')])})),
    'folder': lambda path: path.mkdir(),
    'pipe': lambda path: os.mkfifo(path),
    'link to nothing': lambda path: path.symlink_to('nowhere'),
    'link to itself': loop,
    'endless device': lambda path: path.symlink_to('/dev/zero'),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty one, as the current; nothing in it may take longer than 20 seconds or run the payload."""
    monkeypatch.chdir(tmp_path)

    def late(*_):
        raise TimeoutError('it hangs')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / MARK).exists(), 'a payload was run'


def check_line(error, path):
    message = str(error.value)
    assert message.startswith(f'teacher checkpoint {path}: ')
    assert len(message.splitlines()) == 1
    assert 'weights_only' not in message  # torch's advice is to run what is in it


def check_refused(path):
    with pytest.raises(ConfigError) as error:
        read_checkpoint(path)
    check_line(error, path)
    with pytest.raises(ConfigError) as error:
        check_resumable(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('place', PLACES)
def test_a_payload_is_refused_wherever_it_is(folder, place, kind):
    path = folder / 'evil.pth'
    torch.save(PLACES[place](Run(os.system, touch())), path, **FORMATS[kind])
    check_refused(path)
    with pytest.raises(ConfigError):  # as mmengine loads init_cfg, load_from, --resume and what is tested
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


@pytest.mark.parametrize('payload', PAYLOADS)
def test_every_payload_is_refused(folder, payload):
    path = folder / 'evil.pth'
    torch.save(dict(state_dict={'a': PAYLOADS[payload]()}), path)
    check_refused(path)


@pytest.mark.parametrize('name', BROKEN)
def test_what_is_broken_is_one_line(folder, name):
    path = folder / 'broken.pth'
    BROKEN[name](path)
    check_refused(path)


def test_the_payload_would_run(folder, monkeypatch):
    """--trust-checkpoint reads it: what the tests above refuse is no dud."""
    path = folder / 'evil.pth'
    torch.save(PLACES['meta'](Run(os.system, touch())), path)
    monkeypatch.setattr(weights, '_trusted', True)
    read_file(path)
    assert (folder / MARK).exists()
    (folder / MARK).unlink()


def test_a_config_in_a_checkpoint_is_not_run(folder, monkeypatch):
    """mmengine runs ``meta.config`` as Python when it resumes."""
    path = folder / 'evil.pth'
    torch.save(dict(state_dict={'a': torch.zeros(2)}, meta=dict(epoch=0, iter=1, config=python())), path)
    assert 'config' not in CheckpointLoader.load_checkpoint(str(path), 'cpu')['meta']
    monkeypatch.setattr(weights, '_trusted', True)
    assert 'config' in CheckpointLoader.load_checkpoint(str(path), 'cpu')['meta']


@pytest.mark.slow
@pytest.mark.parametrize('role', ['teacher', 'load_from', 'resume', 'last_checkpoint', 'init_cfg', 'test', 'export'])
def test_the_tools_print_one_line(folder, role):
    config = shapes_config(folder, distilled(folder, dict(cwd=dict(type='CWD', layer='neck'))))
    evil, work = folder / 'evil.pth', folder / 'work'
    content = dict(state_dict=models.build(detectors.retinanet(classes=6)).state_dict(), meta=dict(epoch=0, iter=1))
    torch.save(dict(content, optimizer={}, message_hub={0: Run(os.system, touch())}), evil)
    if role == 'teacher':
        config.model.teacher.checkpoint = str(evil)
    elif role == 'load_from':
        config.load_from = str(evil)
    elif role == 'init_cfg':
        config.model.student.init_cfg = dict(type='Pretrained', checkpoint=str(evil))
    elif role == 'last_checkpoint':
        work.mkdir()
        (work / 'last_checkpoint').write_text(str(evil))
    config.dump(folder / 'config.py')
    arguments = dict(
        resume=['--resume', evil], last_checkpoint=['--resume'], test=[evil], export=[evil, folder / 'out']
    )
    command = role if role in ('test', 'export') else 'train'
    signal.alarm(120)
    printed = tool(command, folder / 'config.py', *arguments.get(role, []), expect=1)
    assert 'Traceback' not in printed
    assert printed.splitlines()[-1].startswith('error: ')
    assert 'refused, it holds code instead of weights alone (posix.system)' in printed.splitlines()[-1]
