"""Schemes: several teachers for a method, other classes, other sizes, images without labels, pseudo labels."""

from pathlib import Path

from of_teachers import several, teacher
from table import Accepted, Case

TWO = ', '.join(f"{name}=dict(config='teacher.py', checkpoint='teacher.pth')" for name in 'ab')
LARGE = "config='teacher.py', checkpoint='teacher.pth'"
KD = "type='KD', _delete_=True, "


def classes(name: str, given: str, expected, method: str = "type='KD', _delete_=True") -> Case:
    text = f'model = dict(teacher=dict(classes={given}), distillers=dict(cwd=dict({method})))'
    return Case(name, expected, text)


def combined(name: str, combine: str, expected, method: str = KD, teachers: str = "['a', 'b']") -> Case:
    return several(name, TWO, expected, f'{method}teacher={teachers}, combine={combine}')


def of_labels(name: str, source: str, method: str, expected) -> Case:
    entry = f"dict(_delete_=True, it=dict(type='{method}'))"
    return Case(name, expected, f'model = dict(teacher=dict(_delete_=True, {source}), distillers={entry})')


def data(name: str, pipeline: str, expected, more: str = '') -> Case:
    load = "dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)"
    text = f'train_dataloader = dict(dataset=dict(pipeline=[{load}, {pipeline}]){more})'
    return Case(name, expected, text)


def viewed(name: str, pipeline: str, expected) -> Case:
    case = data(name, pipeline, expected)
    return case._replace(text=f"{case.text}\nmodel = dict(teacher=dict(view='weak'))")


def pseudo(name: str, given: str, expected) -> Case:
    return Case(name, expected, f'model = dict(pseudo_labels={given})')


def labels(name: str, arguments: list[str], expected, files=None) -> Case:
    return Case(name, expected, tool='pseudo_label', arguments=arguments, files=files)


def taken(folder: Path) -> None:
    (folder / 'labels.json').write_text('{}')


CASES = [
    classes(
        'a class with a typo', "dict(circel='circle')", r"the student has no class 'circel'; the nearest are 'circle'"
    ),
    classes(
        "a teacher's class with a typo",
        "dict(circle='circles')",
        r"the names of the teacher are not known|the teacher has no class 'circles'; the nearest are 'circle'",
    ),
    classes(
        'two classes of one', 'dict(circle=0, ring=0)', r"'circle' and 'ring' of the student both are 0 of the teacher"
    ),
    classes('a class of which there is none', 'dict(circle=6)', r'teacher class 6; it has 6, 0 to 5'),
    classes('no classes', '{}', r"classes={}: expected the student's classes"),
    classes('a list of classes', "['circle']", r"classes=\['circle'\]: expected the student's classes"),
    classes(
        'a method that compares all classes',
        'dict(circle=1, square=0)',
        r'GID reads .bbox_head. of a teacher with other classes',
        "type='GID', _delete_=True",
    ),
    classes('classes for features', 'dict(circle=1)', Accepted('features have no classes'), ''),
    teacher('a size of nothing', 'scale=0.0', r'scale=0.0: expected a number from 0.1 to 10'),
    teacher('a size that is a word', "scale='double'", r"scale='double': expected a number"),
    combined('an unknown combination', "'median'", r"combine='median': expected one of mean, entropy, labels, drop"),
    combined('weights of one alone', 'dict(a=1.0)', r'expected a weight for each of its teachers, a, b'),
    combined('a weight that is a word', "dict(a=1.0, b='x')", r"combine.b='x'"),
    combined('a negative weight', 'dict(a=1.0, b=-1)', r'combine.b=-1'),
    combined('a probability above one', "dict(type='drop', p=1.5)", r'p=1.5: expected a probability'),
    combined('an option that there is not', "dict(type='mean', p=0.5)", r'expected one of mean, entropy'),
    combined('by labels, of a detector', "'labels'", r"combine='labels': takes a segmentor"),
    combined('the best, of a detector', "'best'", r"combine='best': takes a segmentor.* choose 'mean_logits'"),
    combined('one target, of features', "'mean_logits'", r'reads class logits, which CWD does not compare', ''),
    combined('by entropy, of features', "'entropy'", r'reads class logits, which CWD does not compare', ''),
    combined('one teacher twice', "'mean'", r'expected a name, or a list of names, each once', KD, "['a', 'a']"),
    combined('no teacher', "'mean'", r'expected a name, or a list of names, each once', KD, '[]'),
    combined('one that is not there', "'mean'", r"teacher='c': there is none; there are a, b", KD, "['a', 'c']"),
    combined('a combination of one', "'mean'", r"combine='mean': there is one teacher", KD, "'a'"),
    of_labels('labels beside a teacher', LARGE, 'LGD', r"LGD learns from labels .* use teacher=dict\(type='Own'\)"),
    of_labels('encoded labels of a teacher', LARGE, 'LabelEnc', r'LabelEnc learns from labels, found a RetinaNet'),
    of_labels(
        'a label encoder that is not there',
        "type='LabelEncoder', checkpoint='x.pth'",
        'LabelEnc',
        r'model.teacher.checkpoint x.pth: no such file',
    ),
    of_labels(
        'a label encoder that is none',
        "type='LabelEncoder', checkpoint='student.pth'",
        'LabelEnc',
        r'holds 0 label encoders that fit',
    ),
    several(
        'uncertainty of a method without levels',
        TWO,
        r'distillers.cwd.uncertainty: KD does not compare features level by level',
        f"{KD}teacher='a', uncertainty=dict(p=0.1)",
    ),
    several(
        'an uncertainty without a range',
        TWO,
        r'uncertainty: p=1.5: expected a prob',
        "teacher='a', uncertainty=dict(p=1.5)",
    ),
    several(
        'an unknown option of it', TWO, r'uncertainty=.*expected a dict', "teacher='a', uncertainty=dict(rate=0.1)"
    ),
    Case('a task weight that is a word', r"task_weight='none'", "model = dict(task_weight='none')"),
    Case('a negative task weight', r'task_weight=-1', 'model = dict(task_weight=-1)'),
    pseudo('no images for pseudo labels', '{}', r'model.pseudo_labels: no training image is without labels'),
    pseudo('pseudo labels that are a number', '0.5', r'pseudo_labels=0.5: expected a dict'),
    pseudo(
        'scores out of order',
        'dict(score=0.3, uncertain=0.5)',
        r'uncertain=0.5: expected a probability below score=0.3',
    ),
    pseudo('a score in percent', 'dict(score=70)', r'score=70: expected a probability above 0'),
    pseudo('an option with a typo', 'dict(threshold=0.5)', r"pseudo_labels has no option 'threshold'"),
    teacher('a view that the data do not give', "view='weak'", r"sees the view 'weak', which it does not give"),
    teacher('a view that is no name', "view='weak one'", r"view='weak one': expected a name|sees the view 'weak one'"),
    viewed(
        'a view that is moved apart',
        "dict(type='mmkd.KeepView'), dict(type='RandomFlip', prob=0.5), "
        "dict(type='PackDetInputs', meta_keys=('img_shape', 'weak'))",
        r"RandomFlip behind the view 'weak' would move the pixels of the image alone",
    ),
    data(
        'a view that is not handed on',
        "dict(type='mmkd.KeepView'), dict(type='PackDetInputs')",
        r"mmkd.KeepView adds an image .* meta_keys=\(..., 'weak'\)",
    ),
    data(
        'an image beside the first that is not there',
        "dict(type='mmkd.LoadView', view='thermal', replace={'train': 'thermal'}), "
        "dict(type='PackDetInputs', meta_keys=('img_shape', 'thermal'))",
        r'LoadView: .*thermal.* does not exist; correct replace',
    ),
    data(
        'unlabelled images that are not handed on',
        "dict(type='mmkd.Unlabelled'), dict(type='PackDetInputs')",
        r"mmkd.Unlabelled marks images .* meta_keys=\(..., 'domain'\)",
    ),
    data(
        'partial labels that are not handed on',
        "dict(type='mmkd.LabelledFor', classes=['circle']), dict(type='PackDetInputs')",
        r"mmkd.LabelledFor marks images .* meta_keys=\(..., 'labelled_for'\)",
    ),
    data(
        'partial labels that the pipeline around would have to hand on',
        "dict(type='mmkd.LabelledFor', classes=['circle'])",
        r'mmkd.LabelledFor marks images .* which the pipeline around it leaves out',
    ),
    data(
        'labels for a class that is not there',
        "dict(type='mmkd.LabelledFor', classes=['circel']), "
        "dict(type='PackDetInputs', meta_keys=('img_shape', 'labelled_for'))",
        r"LabelledFor: the student has no class 'circel'; the nearest are 'circle'",
    ),
    data(
        'labels for no class',
        "dict(type='mmkd.LabelledFor', classes=[]), dict(type='PackDetInputs', meta_keys=('img_shape', 'labelled_for'))",
        r'expected a list of classes',
    ),
    Case(
        'a sampler of domains with a single data set',
        r'DomainSampler: dataset is a CocoDataset',
        "train_dataloader = dict(sampler=dict(_delete_=True, type='mmkd.DomainSampler'))",
    ),
    Case(
        'a sampler without an end and epochs',
        r'train_dataloader.sampler: InfiniteSampler has no end, and train_cfg counts epochs',
        "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2)",
    ),
    labels(
        'pseudo labels into a file that is there',
        ['plain.py', 'student.pth', 'data/val', 'labels.json'],
        r'OUT labels.json: is there already',
        taken,
    ),
    labels(
        'a detector into a folder', ['plain.py', 'student.pth', 'data/val', 'labels'], r'a detector writes a COCO file'
    ),
    labels('no images', ['plain.py', 'student.pth', 'masks/nothing', 'labels.json'], r'has no image'),
    labels('a score above one', ['plain.py', 'student.pth', 'data/val', 'labels.json', '--score', '2'], r'--score 2.0'),
    labels('no weights', ['plain.py', 'x.pth', 'data/val', 'labels.json'], r'checkpoint x.pth: no such file'),
    labels(
        'labelled data that are none',
        ['plain.py', 'student.pth', 'data/val', 'labels.json', '--like', 'plain.py'],
        r'--like plain.py: is no COCO file',
    ),
]
