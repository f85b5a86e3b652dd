"""Config files: their syntax, what they are based on, and what they are."""

from pathlib import Path

from table import Accepted, Case


def written(text: str | bytes, name: str = 'config.py'):
    """A file of the working directory."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def alone(name: str, expected, text: str | bytes, file: str = 'config.py') -> Case:
    """A file that is based on nothing."""
    return Case(name, expected, files=written(text, file), arguments=(file,))


CASES = [
    Case(
        'a bracket that is not closed', r"config config.py, line 2: not Python: '\(' was never closed", 'model = dict('
    ),
    Case('an indented line', r'config config.py, line 3: not Python: unexpected indent', 'a = 1\n  b = 2'),
    Case('a comma that is missing', r'config config.py, line 2: not Python', 'model = dict(a=1 b=2)'),
    Case(
        'a key twice in dict()',
        r'config.py, line 2: not Python: keyword argument repeated: cwd',
        'a = dict(cwd=1, cwd=2)',
    ),
    Case('a key twice in braces', r"config.py, line 2: 'cwd' is twice in one dict", "a = {'cwd': 1, 'cwd': 2}"),
    Case('a key twice below', r"config.py, line 3: 'x' is twice", "a = dict(b=[\n{'x': 1, 'y': 2, 'x': 2}])"),
    Case(
        'a key twice in the base',
        r"config middle.py, line 2: 'a' is twice in one dict",
        base='middle.py',
        files=written("_base_ = 'base.py'\nx = {'a': 1, 'a': 2}\n", 'middle.py'),
    ),
    Case(
        'a name that is not defined', r"config config.py, line 2: NameError: name 'TOPK' is not defined", 'topk = TOPK'
    ),
    Case('a division by zero', r'config config.py, line 3: ZeroDivisionError', 'a = 1\nb = a / 0'),
    Case('an attribute of the base that is not there', r'config config.py, line 2: .*modell', 'model = _base_.modell'),
    Case(
        'a file that it reads and is not there',
        r'config.py, line 2: FileNotFoundError',
        "x = open('nothere.txt').read()",
    ),
    Case(
        'an error in the base',
        r'config middle.py, line 2: NameError',
        base='middle.py',
        files=written('a = 1\nb = c\n', 'middle.py'),
    ),
    Case('a base that is not there', r"_base_ 'bas.py': no such file .*; the nearest are 'base.py'", base='bas.py'),
    Case('a base of mmkd with a typo', r"the nearest are .*'gid_retinanet.py'", base='mmkd::gid_retinane.py'),
    Case('a base of mmdet with a typo', r'config config.py: .*', base='mmdet::retinanet/retinanet_r50_fpn_1x_cocoo.py'),
    Case('a base of a package that is not installed', r'mmpose is not installed|mmpose', base='mmpose::body/x.py'),
    Case(
        'the same key in two bases', r'config config.py: KeyError: Duplicate key is not allowed among bases', base=''
    )._replace(files=written("_base_ = ['base.py', 'plain.py']\n"), arguments=('config.py',)),
    Case(
        'a dict over a string',
        r'config config.py: TypeError: layer=.*_delete_=True',
        'model = dict(distillers=dict(cwd=dict(layer=dict(a=1))))',
    ),
    Case(
        'the teacher over a string',
        r'teacher=.*_delete_=True',
        "model = dict(teacher=dict(config='x.py'))",
        base='named.py',
    )._replace(
        files=written(
            "_base_ = 'base.py'\nmodel = dict(teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py')\n", 'named.py'
        )
    ),
    Case(
        'custom_imports of what is not there',
        r'Failed to import my_method, which custom_imports names \(is it on',
        "custom_imports = dict(imports=['my_method'])",
    ),
    Case(
        'a part with a typo',
        r"nothing reads 'optim_wraper'; 'optim_wrapper' was meant",
        'optim_wraper = dict(optimizer=dict(lr=1))',
    ),
    Case('a loader with a typo', r"nothing reads 'train_dataloder'", 'train_dataloder = dict(batch_size=1)'),
    Case('default_scope with a typo', r'there is no such|mmdett', "default_scope = 'mmdett'"),
    alone('an empty file', r'config config.py: it has no model', ''),
    alone('a file without a model', r'config config.py: it has no model', 'a = 1\n'),
    alone('a model that is a name', r"config config.py: model='RetinaNet': expected a dict", "model = 'RetinaNet'\n"),
    alone(
        'a model that is a list',
        r'config config.py: model=\[.*\]: expected a dict',
        "model = [dict(type='RetinaNet')]\n",
    ),
    alone('a model alone', r"no such model in mmengine; .*default_scope='mmdet'", "model = dict(type='RetinaNet')\n"),
    alone('bytes', r'config config.py.*: not Python|config config.py: ', b'\x80\x02}q\x00.'),
    alone('json of something else', r'config package.json: it has no model', '{"name": "x"}', 'package.json'),
    alone('json that is a list', r'config x.json: ', '[1, 2]', 'x.json'),
    alone('json that is cut off', r'config x.json: .*', '{"model": {', 'x.json'),
    alone('yaml of something else', r'config x.yaml: it has no model', 'name: x\n', 'x.yaml'),
    alone('yaml that is none', r'config x.yaml: ', 'a: [1,\nb: {', 'x.yaml'),
    alone('a text file', r'config notes.txt: not a config', 'x', 'notes.txt'),
    Case(
        'a config with a dash in its name',
        Accepted('mmengine reads it by its path'),
        arguments=('my-config.py',),
        files=written("_base_ = 'base.py'\n", 'my-config.py'),
    ),
    Case(
        'a config with a dot in its name',
        Accepted('mmengine reads it by its path'),
        arguments=('my.config.py',),
        files=written("_base_ = 'base.py'\n", 'my.config.py'),
    ),
    Case(
        'a config with spaces in its name',
        Accepted('mmengine reads it by its path'),
        arguments=('my config.py',),
        files=written("_base_ = 'base.py'\n", 'my config.py'),
    ),
    Case('variables of its own', Accepted('configs have them'), "my_classes = 6\nmodel_name = 'x'\nlr = 0.1"),
]
