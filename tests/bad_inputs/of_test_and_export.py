"""Arguments of tools/test.py and tools/export.py, and what is tested."""

from pathlib import Path

import torch
from table import Accepted, Case


def test(name: str, arguments: tuple, expected, **more) -> Case:
    return Case(name, expected, tool='test', arguments=arguments, **more)


def export(name: str, arguments: tuple, expected, **more) -> Case:
    return Case(name, expected, tool='export', arguments=arguments, **more)


def cut(place: Path) -> None:
    whole = (place / 'student.pth').read_bytes()
    (place / 'cut.pth').write_bytes(whole[: len(whole) // 2])


def page(place: Path) -> None:
    (place / 'page.pth').write_text('<!doctype html>')


def no_weights(place: Path) -> None:
    torch.save(dict(epoch=3), place / 'none.pth')


def taken(place: Path) -> None:
    (place / 'out.pth').touch()


C = '--cfg-options'

CASES = [
    test('no arguments', (), r'required: config, checkpoint'),
    test('no checkpoint', ('base.py',), r'required: checkpoint'),
    test('arguments in the wrong order', ('student.pth', 'base.py'), r'config student.pth: not a config'),
    test('a checkpoint that is not there', ('base.py', 'x.pth'), r'checkpoint x.pth: no such file'),
    test('a checkpoint that is a folder', ('base.py', 'data'), r'checkpoint data: no such file'),
    test('a checkpoint that is a config', ('base.py', 'plain.py'), r'checkpoint plain.py: '),
    test(
        'a checkpoint that is cut off',
        ('base.py', 'cut.pth'),
        r'checkpoint cut.pth: cannot be read, it may be truncated',
        files=cut,
    ),
    test(
        'a checkpoint that is a web page',
        ('base.py', 'page.pth'),
        r'checkpoint page.pth: is no checkpoint of PyTorch, or damaged',
        files=page,
    ),
    test(
        'a checkpoint without weights',
        ('base.py', 'none.pth'),
        r'checkpoint none.pth: holds no weights',
        files=no_weights,
    ),
    test(
        "the teacher's checkpoint",
        ('base.py', 'teacher.pth'),
        r'checkpoint teacher.pth does not fit DistilledRetinaNet',
    ),
    test(
        'a checkpoint of the other task', ('base.py', 'masks_teacher.pth'), r'checkpoint masks_teacher.pth does not fit'
    ),
    test('an unknown option', ('base.py', 'student.pth', '--show-dirs', 'x'), r'unrecognized arguments'),
    test(
        'predictions without a suffix',
        ('base.py', 'student.pth', '--out', 'predictions'),
        r'--out predictions: expected a name that ends with .pkl',
    ),
    test(
        'predictions as json',
        ('base.py', 'student.pth', '--out', 'x.json'),
        r'--out x.json: expected a name that ends with .pkl',
    ),
    test(
        "predictions into a file's folder",
        ('base.py', 'student.pth', '--out', 'base.py/x.pkl'),
        r'--out .*base.py is a file',
    ),
    test(
        'pictures into a file',
        ('base.py', 'student.pth', '--show-dir', 'base.py'),
        r'--show-dir base.py: .* is a file, not a folder',
    ),
    test(
        'data that are not there',
        ('base.py', 'student.pth', C, 'test_dataloader.dataset.data_root=x'),
        r'test_dataloader.dataset.data_root: .*/x does not exist',
    ),
    test(
        'an annotation file that is not there',
        ('base.py', 'student.pth', C, 'test_evaluator.ann_file=x.json'),
        r'test_evaluator.ann_file: .*x.json does not exist',
    ),
    test(
        'a typo in the changes',
        ('base.py', 'student.pth', C, 'test_dataloder.batch_size=1'),
        r"the nearest are 'test_dataloader.batch_size'",
    ),
    test(
        'a config without a test',
        ('notest.py', 'student.pth'),
        r'test_dataloader: missing; mmengine takes all of',
        files=lambda place: (place / 'notest.py').write_text("_base_ = 'base.py'\ntest_dataloader = None\n"),
    ),
    test(
        'a config without anything to test',
        ('notest.py', 'student.pth'),
        r'test_cfg: missing|test_dataloader: missing',
        files=lambda place: (place / 'notest.py').write_text(
            "_base_ = 'base.py'\ntest_dataloader = None\ntest_cfg = None\ntest_evaluator = None\n"
        ),
    ),
    test(
        'other classes than the head',
        ('three.py', 'student.pth'),
        r'bbox_head.num_classes=6: test_dataloader.dataset has 2',
        files=lambda place: (place / 'three.py').write_text(
            "_base_ = 'base.py'\ntest_dataloader = dict(dataset=dict(metainfo=dict(classes=('circle', 'square'))))\n"
        ),
    ),
    export('no arguments', (), r'required: config, checkpoint, output'),
    export('no output', ('base.py', 'student.pth'), r'required: output'),
    export('arguments in the wrong order', ('student.pth', 'base.py', 'out'), r'config student.pth: not a config'),
    export(
        'a plain config',
        ('plain.py', 'student.pth', 'out'),
        r'plain.py: not a distilled model \(model has no student\)',
    ),
    export(
        'a checkpoint that is not there',
        ('base.py', 'x.pth', 'out'),
        r'checkpoint x.pth: no such file \(looked in [^;]*$',
    ),
    export(
        'a checkpoint that is cut off', ('base.py', 'cut.pth', 'out'), r'checkpoint cut.pth: cannot be read', files=cut
    ),
    export(
        'a checkpoint that is a web page',
        ('base.py', 'page.pth', 'out'),
        r'checkpoint page.pth: is no checkpoint of PyTorch, or damaged',
        files=page,
    ),
    export(
        'a checkpoint without weights',
        ('base.py', 'none.pth', 'out'),
        r'checkpoint none.pth: holds no weights',
        files=no_weights,
    ),
    export(
        "the teacher's checkpoint", ('base.py', 'teacher.pth', 'out'), r'checkpoint teacher.pth does not fit RetinaNet'
    ),
    export(
        'an output that is there',
        ('base.py', 'student.pth', 'out'),
        r'out.pth exists; remove it, or choose another name',
        files=taken,
    ),
    export('the checkpoint as the output', ('base.py', 'student.pth', 'student'), r'student.pth exists; remove it'),
    export(
        'an output below a file',
        ('base.py', 'student.pth', 'base.py/out'),
        r'output base.py: .*base.py is a file, not a folder',
    ),
    export(
        'an output that cannot be written',
        ('base.py', 'student.pth', '/proc/x/out'),
        r'output /proc/x: nothing can be written to /proc',
    ),
    export(
        'an output with a suffix', ('base.py', 'student.pth', 'new.pth'), Accepted('the suffixes are added')
    )._replace(arguments=('base.py', 'student.pth', 'new.pth')),
    test(
        'predictions into a folder that is not there',
        ('base.py', 'student.pth', '--out', 'a/b.pkl'),
        Accepted('it is made'),
    ),
    test(
        'no teacher',
        ('base.py', 'student.pth', C, 'model.teacher.checkpoint=nowhere.pth'),
        Accepted('testing needs none'),
    ),
    export('into a folder that is not there', ('base.py', 'student.pth', 'a/b/new'), Accepted('it is made')),
    export(
        'a work directory that cannot be made',
        ('base.py', 'student.pth', 'new', '--work-dir', '/proc/x'),
        Accepted('export writes nothing there'),
    ),
]
