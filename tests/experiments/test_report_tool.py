"""``mmkd report`` on trainings of one's own: tiny models, through the real Runner."""

import base64
import copy
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image

from mmkd.commands.report import main
from mmkd.experiments.boxes import Boxes
from mmkd.experiments.label_maps import LabelMaps, as_rgb
from mmkd.experiments.pictures import jpeg, palette
from mmkd.experiments.run_report import _results, config_difference, task_loss
from mmkd.experiments.suites import Score
from mmkd.experiments.work_dirs import Finished
from mmkd.testing import detectors, segmentors
from mmkd.testing.runs import shapes_config, streets_config

pytestmark = pytest.mark.slow

SMALL = {'mmdet': detectors.retinanet(classes=6), 'mmseg': segmentors.pspnet()}
LARGE = {'mmdet': detectors.retinanet(classes=6, channels=24, base=12), 'mmseg': segmentors.pspnet(24)}
METHOD = {'mmdet': dict(type='AT', layer='neck'), 'mmseg': dict(type='KD')}
SCORE = {'mmdet': 'coco/bbox_mAP', 'mmseg': 'mIoU'}


class Page(HTMLParser):
    """Headings, tables as lists of rows, pictures, and what a page would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.tables, self.pictures, self.elsewhere = [], [], [], []
        self._into = None
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
            self._into = self.tables[-1][-1]
        elif tag in ('h1', 'h2'):
            self.headings.append('')
            self._into = self.headings
        elif tag == 'img':
            self.pictures.append((given['alt'], given['src']))
        source = given.get('src') or given.get('href') or ''
        if source and not source.startswith('data:'):
            self.elsewhere.append(source)

    def handle_data(self, data):
        if self._into:
            self._into[-1] += data.strip()

    def handle_endtag(self, tag):
        if tag in ('td', 'th', 'h1', 'h2'):
            self._into = None

    def table(self, column):
        """The table whose first column is called so: its rows, by their first cell, as dicts."""
        (rows,) = [each for each in self.tables if each and each[0][0] == column]
        return {row[0]: dict(zip(rows[0], row)) for row in rows[1:]}


def train(config, folder):
    config.work_dir = str(folder)
    config.experiment_name = config.visualizer.name = re.sub(r'\W', '_', str(folder))
    config.default_hooks.logger.log_metric_by_epoch = 'max_epochs' in config.train_cfg
    Runner.from_cfg(copy.deepcopy(config)).train()


@pytest.fixture(scope='module', params=['mmdet', 'mmseg'])
def trained(request, tmp_path_factory):
    """Work directories of a teacher, trained for epochs, of a student alone and of a distilled one, for iterations."""
    scope, root = request.param, tmp_path_factory.mktemp(request.param)
    make = shapes_config if scope == 'mmdet' else streets_config
    with DefaultScope.overwrite_default_scope(scope):
        config = make(root, SMALL[scope], iterations=6, images=8)
        config.setdefault('visualizer', dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]))
        config.train_cfg.val_interval = config.default_hooks.checkpoint.interval = 3
        config.optim_wrapper.optimizer = dict(type='AdamW', lr=0.01)
        train(config, root / 'alone')
        teacher = copy.deepcopy(config)
        teacher.merge_from_dict({'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2)})
        teacher.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
        teacher.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
        teacher.param_scheduler = []
        teacher.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
        teacher.model = LARGE[scope]
        train(teacher, root / 'teacher')
        config.model = dict(
            type='mmkd.Distill',
            student=SMALL[scope],
            teacher=dict(config=LARGE[scope], checkpoint=str(root / 'teacher' / 'epoch_2.pth')),
            distillers=dict(own=dict(METHOD[scope], loss_weight=2.5)),
        )
        config.optim_wrapper.optimizer.lr = 0.02
        train(config, root / 'distilled')
    Config(dict(model=LARGE[scope])).dump(root / 'large.py')
    return SimpleNamespace(scope=scope, root=root, score=SCORE[scope])


@pytest.fixture
def report(monkeypatch, capsys):
    """``mmkd report``, called as in a shell: the page; or the line it ends with."""

    def call(*arguments, fails=False):
        monkeypatch.setattr(sys, 'argv', ['mmkd report', *map(str, arguments)])
        if fails:
            with pytest.raises(SystemExit) as end:
                main()
            return str(end.value)
        main()
        return Page(open(re.search('Report: (.*)', capsys.readouterr().out)[1]).read())

    return call


def logged(folder, key):
    lines = next(folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [json.loads(line)[key] for line in lines if key in json.loads(line)]


def test_all_that_a_report_says(trained, report):
    root, shown = trained.root, {'mmdet': 'AP', 'mmseg': 'mIoU'}[trained.scope]
    page = report(root / 'distilled', '--alone', root / 'alone', '--teacher', root / 'teacher', '--images', 2)
    assert (root / 'distilled' / 'report.html').is_file()
    assert page.elsewhere == []  # self-contained
    results, digits = page.table('metric'), 3 if trained.scope == 'mmdet' else 2
    for name in ('alone', 'distilled', 'teacher'):
        column = 'student alone' if name == 'alone' else name
        assert results[shown][column] == f'{logged(root / name, trained.score)[-1]:.{digits}f}'
    assert {'gain', 'gap closed'} <= set(results[shown])
    assert len(results) == {'mmdet': 6, 'mmseg': 3}[trained.scope]
    series = page.table('curve')
    assert (series['own.loss']['first'], series['own.loss']['last']) != ('', '')
    assert float(series['own.loss']['first']) == pytest.approx(logged(root / 'distilled', 'own.loss')[0], rel=0.02)
    assert (series[f'{shown} of distilled']['first'], series['task loss of distilled']['at']) != ('', '')
    first = json.loads(next((root / 'alone').glob('*/vis_data/scalars.json')).read_text().splitlines()[0])
    assert float(series['task loss of student alone']['first']) == pytest.approx(first['loss'], rel=0.01)  # all of it
    assert page.table('training of')['distilled']['iterations'] == '6'
    classes = page.table('class')
    assert len(classes) == {'mmdet': 7, 'mmseg': 20}[trained.scope]
    gains = [float(row['gain']) for name, row in classes.items() if name != 'mean' and row['gain'] != '-']
    assert gains == sorted(gains, reverse=True)
    for name in ('student alone', 'distilled', 'teacher'):  # the weights of the last evaluation, evaluated again
        assert float(classes['mean'][name]) == pytest.approx(
            float(results[shown][name]), abs=0.06 if digits == 2 else 2e-3
        )
    options = page.table('option')
    assert options['model.distillers.own']['type'] == METHOD[trained.scope]['type']
    assert 'loss_weight=2.5' in options['model.distillers.own']['options']
    assert f'config={LARGE[trained.scope].type}' in options['model.teacher']['options']
    assert '- optim_wrapper.optimizer.lr = 0.01' in page.text
    assert '+ optim_wrapper.optimizer.lr = 0.02' in page.text
    assert page.table('package')['torch']['this report'].startswith(torch.__version__.partition('+')[0])
    curves = [source for alt, source in page.pictures if source.startswith('data:image/svg+xml;base64,')]
    assert len(curves) == 3
    panels = [alt for alt, source in page.pictures if source.startswith('data:image/jpeg;base64,')]
    assert len(panels) % {'mmdet': 4, 'mmseg': 8}[trained.scope] == 0
    if trained.scope == 'mmseg':  # a detector of six iterations finds nothing, alike with and without distillation
        order = ['image', 'ground truth', 'student alone', 'distilled', 'teacher', 'student alone: wrong']
        assert panels[:6] == order


def test_without_alone_and_teacher(trained, report, tmp_path):
    page = report(trained.root / 'alone', '--out', tmp_path / 'new' / 'page.html', '--images', 1)
    assert (tmp_path / 'new' / 'page.html').is_file()
    assert list(page.table('metric').popitem()[1]) == ['metric', 'student']
    assert 'Not given: --alone and --teacher' in page.text
    assert ('Best images' in page.headings, 'Worst images' in page.headings) == (True, True)
    panels = [alt for alt, source in page.pictures if source.startswith('data:image/jpeg;base64,')]
    assert len(panels) == {'mmdet': 4, 'mmseg': 8}[trained.scope]
    assert 'distillation losses' not in page.headings


def test_a_teacher_by_config_and_checkpoint_has_the_scores_of_its_own_training(trained, report):
    root = trained.root
    page = report(root / 'distilled', '--teacher', root / 'large.py', root / 'teacher' / 'epoch_2.pth', '--images', 0)
    shown, digits = ('AP', 3) if trained.scope == 'mmdet' else ('mIoU', 2)
    assert page.table('metric')[shown]['teacher'] == f'{logged(root / "teacher", trained.score)[-1]:.{digits}f}'
    assert 'teacher evaluated here' in page.text


def test_without_pictures_neither_data_nor_checkpoints_are_needed(trained, report, tmp_path):
    for name in ('alone', 'distilled'):
        shutil.copytree(trained.root / name, tmp_path / name, ignore=shutil.ignore_patterns('*.pth'))
    for path in tmp_path.glob('*/*/vis_data/config.py'):
        path.write_text(path.read_text().replace(str(trained.root), str(tmp_path / 'gone')))
    page = report(tmp_path / 'distilled', '--alone', tmp_path / 'alone', '--no-pictures')
    assert page.table('metric')
    assert not [rows for rows in page.tables if rows[0][0] == 'class']
    said = report(tmp_path / 'distilled', fails=True)
    assert re.match(r'error: WORK_DIR .*/distilled: no checkpoint in it \(expected iter_6.pth\); --no-pictures', said)
    shutil.copy(trained.root / 'distilled' / 'iter_6.pth', tmp_path / 'distilled')
    said = report(tmp_path / 'distilled', fails=True)
    assert re.match(r'error: WORK_DIR .*/distilled: val_dataloader.*gone.*--no-pictures leaves out', said)


def _moved(place, old, new, name='alone'):
    (path,) = place.glob(f'{name}/*/vis_data/config.py')
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _without(pattern, name='alone'):
    def change(place):
        found = list(place.glob(f'{name}/{pattern}'))
        assert found
        for path in found:
            path.unlink()

    return change


def _no_config(place):
    _without('*.py')(place)
    _without('*/vis_data/config.py')(place)


def _rename(key, new, name='alone'):
    def change(place):
        (path,) = place.glob(f'{name}/*/vis_data/scalars.json')
        path.write_text(path.read_text().replace(key, new))

    return change


def _no_scores(place):
    (path,) = place.glob('distilled/*/vis_data/scalars.json')
    lines = [line for line in path.read_text().splitlines() if '"loss"' in line]
    path.write_text('\n'.join(lines))


ERRORS = {
    'a folder that is not there': (('nowhere',), r'WORK_DIR nowhere: no such folder \(looked in ', None),
    'a file': (('large.py',), r'WORK_DIR large.py: no such folder', None),
    'no config': (('distilled', '--alone', 'alone'), r'--alone alone: no config in it \(looked for', _no_config),
    'no evaluation': (
        ('distilled',),
        r'WORK_DIR distilled: no evaluation in its log \(.*scalars.json\); mmkd test',
        _no_scores,
    ),
    'no log': (('alone',), r'WORK_DIR alone: no evaluation in its log', _without('*/vis_data/scalars.json')),
    'no checkpoint': (
        ('distilled', '--alone', 'alone'),
        r'--alone alone: no checkpoint in it \(expected iter_6.pth\)',
        _without('*.pth'),
    ),
    'other data': (
        ('distilled', '--alone', 'alone'),
        r'--alone alone: it was evaluated on other data; val_dataloader.dataset.\S+ is .* there and .* in distilled',
        lambda place: _moved(place, '/val', '/train'),
    ),
    'another metric': (
        ('distilled', '--alone', 'alone'),
        r'--alone alone: its evaluations have no (coco/bbox_mAP|mIoU), only ',
        lambda place: [_rename('mIoU', 'mFscore')(place), _rename('coco/', 'voc/')(place)],
    ),
    'an unknown score': (('distilled', '--score', 'mF1'), r'--score mF1: the evaluations of distilled logged ', None),
    'several scores': (
        ('distilled',),
        r'distilled: it has several scores; choose one with --score: ',
        lambda place: [_rename('mIoU', 'mine', 'distilled')(place), _rename('bbox_mAP"', 'mine"', 'distilled')(place)],
    ),
    'a teacher without weights': (
        ('distilled', '--teacher', 'large.py', 'nowhere.pth'),
        r'--teacher checkpoint nowhere.pth: no such file',
        None,
    ),
    'a teacher that would have to run': (
        ('distilled', '--no-pictures', '--teacher', 'large.py', 'distilled/iter_6.pth'),
        r'--teacher CONFIG CHECKPOINT has to be evaluated, and --no-pictures runs no model',
        None,
    ),
    "another model's weights": (
        ('distilled', '--teacher', 'large.py', 'distilled/iter_6.pth'),
        r'checkpoint distilled/iter_6.pth does not fit (RetinaNet|EncoderDecoder)',
        None,
    ),
    'a folder as the output': (('distilled', '--out', 'alone'), r'--out alone: is a folder; name a file', None),
    'an output below a file': (
        ('distilled', '--out', 'large.py/a.html'),
        r'--out large.py: .* is a file, not a folder',
        None,
    ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_what_cannot_be_reported_is_one_line(case, trained, report, tmp_path, monkeypatch):
    arguments, expected, change = ERRORS[case]
    for name in ('alone', 'distilled'):
        shutil.copytree(trained.root / name, tmp_path / name, ignore=shutil.ignore_patterns('report.html'))
    shutil.copy(trained.root / 'large.py', tmp_path)
    monkeypatch.chdir(tmp_path)
    if change:
        change(tmp_path)
    said = report(*arguments, fails=True)
    assert re.match(f'error: {expected}', said), said
    assert '\n' not in said
    assert not list(tmp_path.glob('*/report.html'))


def test_a_missing_package_is_one_line_with_the_command(report, monkeypatch):
    for name in ('mmkd.experiments.run_report', 'mmkd.experiments.pages'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    assert report('anywhere', fails=True) == "error: mmkd report needs jinja2: pip install 'mmkd[experiments]'"


def test_the_best_checkpoint_stands_for_one_that_was_removed(trained, tmp_path):
    shutil.copytree(trained.root / 'alone', tmp_path / 'alone')
    run = Finished('student', tmp_path / 'alone', 'WORK_DIR')
    assert (run.checkpoint.name, run.of_last_evaluation) == ('iter_6.pth', True)
    (tmp_path / 'alone' / 'iter_6.pth').rename(tmp_path / 'alone' / 'best_mIoU_iter_6.pth')
    assert (run.checkpoint.name, run.of_last_evaluation) == ('best_mIoU_iter_6.pth', True)
    (tmp_path / 'alone' / 'best_mIoU_iter_6.pth').unlink()
    assert (run.checkpoint.name, run.of_last_evaluation) == ('iter_3.pth', False)


def test_the_gap_is_closed_by_the_gain_where_the_teacher_is_ahead():
    values = {
        'student alone': {'mAcc': 50.0, 'mIoU': 20.0, 'small': 0.5},
        'distilled': {'mAcc': 49.0, 'mIoU': 35.0, 'small': -1.0, 'new': 0.25},
        'teacher': {'mAcc': 50.0, 'mIoU': 80.0, 'small': 0.7},
    }
    runs = {name: SimpleNamespace(scores=lambda scores=scores: scores) for name, scores in values.items()}
    rows = {row.pop('metric'): list(row.values()) for row in _results(runs, 'distilled', Score('mIoU', 'mIoU', 2))}
    assert list(rows) == ['mIoU', 'mAcc', 'small', 'new']
    assert rows['mIoU'] == ['20.00', '35.00', '80.00', '+15.00', '25 %']
    assert rows['mAcc'] == ['50.00', '49.00', '50.00', '-1.00', '']
    assert rows['small'] == ['none', 'none', 'none', '', '']  # COCO's -1: no object of this size
    assert rows['new'] == ['', '0.250', '', '', '']


def test_the_task_loss_leaves_out_what_distillers_and_peers_add():
    model = Config(dict(model=dict(student={}, teacher=dict(peer=dict(type='Peer')), distillers=dict(gid={}))))
    run = SimpleNamespace(read=lambda: model)
    entry = {'loss': 99.0, 'loss_cls': 1.0, 'aux.loss_ce': 2.0, 'gid.loss_cls': 4.0, 'peer.loss_cls': 8.0, 'acc': 16.0}
    assert task_loss(run)(entry) == 3


def test_the_difference_of_configs_is_that_of_their_options():
    alone = Config(
        dict(model=dict(type='A', depth=1, parts=[dict(x=1)]), optim_wrapper=dict(lr=1), work_dir='a', mine=1)
    )
    model = dict(
        type='mmkd.Distill', student=dict(type='A', depth=2, parts=[dict(x=3)]), distillers=dict(d=dict(type='KD'))
    )
    own = Config(dict(model=model, optim_wrapper=dict(lr=1), work_dir='b', mine=2))
    assert config_difference(alone, own) == [
        '- model.depth = 1',
        '- model.parts.0.x = 1',
        '+ model.depth = 2',
        '+ model.parts.0.x = 3',
        "+ model.distillers.d.type = 'KD'",
    ]


@pytest.mark.parametrize('count', [1, 6, 15, 60, 300])
def test_there_is_a_color_for_every_class(count):
    colors = palette(count, [[1, 2, 3]] * 80)  # of other classes
    assert colors.shape == (count, 3)
    assert len(np.unique(colors, axis=0)) == count
    assert palette(2, [[1, 2, 3], [4, 5, 6]]).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_pictures_are_no_wider_than_asked_and_small_ones_are_enlarged():
    def size(data):
        return Image.open(io.BytesIO(base64.b64decode(data.partition(',')[2]))).size

    assert size(jpeg(np.zeros((50, 1000, 3), np.uint8))) == (480, 24)
    assert size(jpeg(np.zeros((10, 100, 3), np.uint8))) == (400, 40)


def test_images_of_any_number_of_channels_are_shown_in_rgb():
    assert as_rgb(torch.tensor([1, 2, 3]).reshape(3, 1, 1)).ravel().tolist() == [3, 2, 1]
    assert as_rgb(torch.tensor([7]).reshape(1, 1, 1)).ravel().tolist() == [7, 7, 7]
    assert as_rgb(torch.tensor([1, 2, 3, 4]).reshape(4, 1, 1)).ravel().tolist() == [3, 2, 1]


@pytest.fixture
def boxes(tmp_path):
    """Two models' boxes on generated shapes: the ground truth, of which the second model shifts some and confuses others."""
    config = shapes_config(tmp_path, SMALL['mmdet'])
    dataset = DATASETS.build(config.val_dataloader.dataset)
    seen = Boxes.__new__(Boxes)
    seen.classes, seen.dataset = list(dataset.metainfo['classes']), dataset
    seen.truth = [dataset.get_data_info(index) for index in range(len(dataset))]
    random = np.random.default_rng(0)
    seen.found = {'right': [], 'wrong': []}
    for info in seen.truth:
        objects = torch.tensor([each['bbox'] for each in info['instances']]).reshape(-1, 4)
        labels = torch.tensor([each['bbox_label'] for each in info['instances']], dtype=torch.long)
        scores = torch.tensor(random.uniform(0.1, 1, len(labels)), dtype=torch.float32)
        seen.found['right'].append(InstanceData(bboxes=objects, labels=labels, scores=scores))
        shifted = objects + torch.tensor(random.normal(0, 3, objects.shape), dtype=torch.float32)
        mixed = torch.where(torch.tensor(random.random(len(labels)) < 0.3), (labels + 1) % 6, labels)
        seen.found['wrong'].append(InstanceData(bboxes=shifted, labels=mixed, scores=scores))
    seen._evaluated = {name: seen._evaluate(found) for name, found in seen.found.items()}
    return SimpleNamespace(seen=seen, config=config)


def test_ap_by_class_is_that_of_mmdets_own_metric(boxes):
    seen = boxes.seen
    by_class = seen.by_class()
    assert np.nanmin(by_class['right']) > 0.999
    metric = CocoMetric(ann_file=boxes.config.val_evaluator.ann_file, metric='bbox', classwise=True)
    metric.dataset_meta = seen.dataset.metainfo
    for info, found in zip(seen.truth, seen.found['wrong']):
        metric.process({}, [dict(img_id=info['img_id'], ori_shape=(96, 96), pred_instances=found)])
    wanted = metric.evaluate(len(seen.truth))
    assert np.nanmean(by_class['wrong']) == pytest.approx(wanted['coco/bbox_mAP'], abs=6e-4)
    assert 0.05 < wanted['coco/bbox_mAP'] < 0.95
    for name, score in zip(seen.classes, by_class['wrong']):
        assert score == pytest.approx(wanted[f'coco/{name}_precision'], abs=6e-4, nan_ok=True)


def test_an_images_score_falls_with_what_is_wrong_in_it(boxes):
    seen = boxes.seen
    right, wrong = seen.by_image()['right'], seen.by_image()['wrong']
    assert np.nanmin(right) == 1
    assert (wrong <= right).all()
    assert wrong.mean() < 0.9
    none = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
    assert seen._image_scores(seen._evaluate([none] * len(seen.truth))).tolist() == [0] * len(seen.truth)
    one = seen.truth[0]['instances'][:1]  # two boxes, the wrong one has the higher score: precision 1/2 at recall 1
    seen.truth = [dict(seen.truth[0], instances=one)]
    found = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 2, 2], one[0]['bbox']]),
        labels=torch.tensor([one[0]['bbox_label']] * 2),
        scores=torch.tensor([0.9, 0.8]),
    )
    assert seen._image_scores(seen._evaluate([found])).tolist() == [0.5]


def test_ious_leave_out_ignored_pixels_and_classes_that_are_not_there():
    seen = LabelMaps.__new__(LabelMaps)
    # three classes; both, either, found, right
    image = np.array([[2, 0, 0], [4, 3, 0], [2, 3, 0], [4, 0, 0]])
    seen.areas = {'model': np.array([image, image])}
    assert seen.by_class()['model'].tolist()[:2] == [50, 0]
    assert np.isnan(seen.by_class()['model'][2])
    assert seen.by_image()['model'].tolist() == [50, 50]  # of the class that is there
    assert seen.amounts() == ['100.0 %', '0.0 %', '0.0 %']
