"""mmkd pseudo_label: what a model predicts, written as labels."""

import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from tool import tool

from mmkd.data import shapes
from mmkd.data.pseudo_labels import PseudoLabels, boxes_per_image, threshold_like
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import shapes_config, streets_config


@pytest.fixture
def detector(tmp_path):
    """A config, its weights and a folder of images."""
    model = detectors.retinanet(classes=6)
    config = shapes_config(tmp_path, model)
    path = tmp_path / 'detector.py'
    config.dump(path)
    return path, models.save_weights(model, tmp_path / 'detector.pth'), tmp_path / 'shapes' / 'val'


@pytest.fixture
def segmentor(tmp_path):
    model = segmentors.pspnet()
    config = streets_config(tmp_path, model)
    path = tmp_path / 'segmentor.py'
    config.dump(path)
    return path, models.save_weights(model, tmp_path / 'segmentor.pth'), tmp_path / 'streets' / 'leftImg8bit' / 'val'


def label(of, out, **options):
    path, checkpoint, images = of
    labels = PseudoLabels(Config.fromfile(path), checkpoint, images, out, **options)
    labels(workers=0)
    return labels


def test_boxes_as_a_coco_file(detector, tmp_path):
    labels = label(detector, tmp_path / 'out.json', score=0.01)
    kept = list(labels.lines())
    written = labels.write()
    assert not labels.kept.exists()
    coco = COCO(tmp_path / 'out.json')
    assert [each['name'] for each in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
    assert len(coco.imgs) == len(kept) == written['images'] == 8
    for image, line in zip(coco.imgs.values(), kept):
        expected = [
            (box, score, label)
            for box, score, label in zip(line['boxes'], line['scores'], line['labels'])
            if score >= 0.01
        ]
        annotations = coco.imgToAnns[image['id']]
        assert len(annotations) == len(expected)
        for each, (box, score, label_) in zip(annotations, expected):
            left, top, width, height = each['bbox']
            assert [left, top, left + width, top + height] == pytest.approx(box, abs=0.02)
            assert (each['score'], each['category_id']) == (score, label_ + 1)


def test_predictions_are_the_models_own(detector, tmp_path):
    from mmdet.apis import inference_detector, init_detector

    path, checkpoint, images = detector
    labels = label(detector, tmp_path / 'out.json')
    model = init_detector(str(path), str(checkpoint), device='cpu')
    first = sorted(images.iterdir())[0]
    expected = inference_detector(model, str(first)).pred_instances
    line = next(labels.lines())
    assert line['file_name'] == first.name
    assert line['scores'] == pytest.approx(expected.scores.tolist(), abs=1e-4)


def test_it_goes_on_where_it_stopped(detector, tmp_path):
    whole = label(detector, tmp_path / 'whole.json')
    lines = whole.kept.read_text().splitlines()
    again = tmp_path / 'again.partial'
    again.write_text('\n'.join(lines[:4]) + '\n' + lines[4][:20])  # of the fifth image a part
    labels = label(detector, tmp_path / 'again.json')
    assert [line['file_name'] for line in labels.lines()] == [line['file_name'] for line in whole.lines()]


def test_nothing_that_is_there_is_overwritten(detector, tmp_path):
    (tmp_path / 'out.json').write_text('mine')
    with pytest.raises(ConfigError, match='is there already'):
        label(detector, tmp_path / 'out.json')
    assert (tmp_path / 'out.json').read_text() == 'mine'
    label(detector, tmp_path / 'other.json')
    with pytest.raises(ConfigError, match='begun with other options'):
        label(detector, tmp_path / 'other.json', augment=True)


def test_the_threshold_leaves_as_many_boxes_as_there_are_labelled(tmp_path):
    path = tmp_path / 'labelled.json'
    path.write_text(json.dumps(dict(images=[1, 2], annotations=[1, 2, 3])))
    scores = [[0.9, 0.5], [0.8, 0.4], [0.7], [0.6, 0.3]]  # 4 images: 6 boxes
    assert boxes_per_image(path) == 1.5
    threshold = threshold_like(scores, 1.5)
    assert sum(each >= threshold for image in scores for each in image) == 6
    assert threshold_like([[], []], 1.5) == 1.0
    for text in ('{}', 'nothing', json.dumps(dict(images=[], annotations=[]))):
        path.write_text(text)
        with pytest.raises(ConfigError, match='is no COCO file with images'):
            boxes_per_image(path)


def test_mirrored_and_scaled_images_are_merged(detector, tmp_path):
    plain = list(label(detector, tmp_path / 'plain.json').lines())
    merged = list(label(detector, tmp_path / 'merged.json', augment=True).lines())
    assert [each['file_name'] for each in merged] == [each['file_name'] for each in plain]
    assert merged[0]['boxes'] != plain[0]['boxes']
    assert all(0 <= x <= 97 for line in merged for box in line['boxes'] for x in box)


def test_label_maps(segmentor, tmp_path):
    out = tmp_path / 'maps'
    label(segmentor, out, score=0.0)
    files = sorted(out.rglob('*.png'))
    images = sorted(segmentor[2].rglob('*.png'))
    assert [each.relative_to(out) for each in files] == [each.relative_to(segmentor[2]) for each in images]
    sure = [np.asarray(Image.open(each)) for each in files]
    assert sure[0].shape == np.asarray(Image.open(images[0])).shape[:2]
    assert all((each < 19).all() for each in sure)
    label(segmentor, tmp_path / 'surer', score=0.2)
    surer = [np.asarray(Image.open(each)) for each in sorted((tmp_path / 'surer').rglob('*.png'))]
    for one, other in zip(sure, surer):
        assert ((other == one) | (other == 255)).all()
    assert any((each == 255).any() for each in surer)


def test_label_maps_of_the_mean_of_probabilities(segmentor, tmp_path, monkeypatch):
    labels = label(segmentor, tmp_path / 'maps', score=0.0, augment=True)
    sample = type('Sample', (), {})
    logits = torch.randn(3, 19, 4, 5)
    samples = []
    for each in logits:
        one = sample()
        one.seg_logits = type('Data', (), dict(data=each))()
        samples.append(one)
    (merged,) = labels.model.merge_preds([samples])
    torch.testing.assert_close(merged.seg_logits.data.softmax(0), logits.softmax(1).mean(0))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(score=1.5), '--score 1.5'),
        (dict(), 'a detector writes a COCO file'),
        (dict(images='nowhere'), 'has no image'),
    ],
)
def test_what_cannot_be_labelled(options, message, detector, tmp_path):
    path, checkpoint, images = detector
    images = options.pop('images', images)
    out = tmp_path / ('out' if not options and images == detector[2] else 'out.json')
    with pytest.raises(ConfigError, match=message):
        PseudoLabels(Config.fromfile(path), checkpoint, images, out, **options)


@pytest.mark.slow
def test_the_command_and_a_training_on_what_it_wrote(detector, tmp_path):
    path, checkpoint, images = detector
    out = tmp_path / 'labels.json'
    like = tmp_path / 'shapes' / 'annotations' / 'val.json'
    said = tool('pseudo_label', path, checkpoint, images, out, '--like', like).splitlines()[-1]
    wanted = len(json.loads(like.read_text())['annotations'])
    found = int(re.match(rf'{out}: (\d+) boxes of at least \S+ in 8 images', said)[1])
    assert wanted <= found <= wanted + 5  # a model of random weights gives some the same score
    config = Config.fromfile(path)
    config.train_dataloader.dataset.update(ann_file=str(out), data_prefix=dict(img='val/'))
    config.dump(tmp_path / 'student.py')
    tool('train', tmp_path / 'student.py', '--work-dir', tmp_path / 'student')
    assert 'is there already' in tool('pseudo_label', path, checkpoint, images, out, expect=1)


def test_augmentation_of_the_configs_own(detector, tmp_path):
    """Its ``tta_pipeline``, without the labels that it loads and with the meta data that merging reads."""
    path, *_ = detector
    config = Config.fromfile(path)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    packed = dict(type='PackDetInputs', meta_keys=('img_id', 'img_shape', 'flip', 'flip_direction'))
    config.tta_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 96)),
        dict(type='TestTimeAug', transforms=[flips, [dict(type='LoadAnnotations', with_bbox=True)], [packed]]),
    ]
    config.dump(path)
    labels = label(detector, tmp_path / 'out.json', augment=True)
    assert len(labels.images[0]['inputs']) == 2  # and not the six of scales and flips
    assert all(line['boxes'] for line in labels.lines())


def test_label_maps_of_data_whose_first_class_is_1(segmentor, tmp_path):
    path, *_ = segmentor
    plain = label(segmentor, tmp_path / 'plain', score=0.0)
    config = Config.fromfile(path)
    config.test_dataloader.dataset.reduce_zero_label = True
    config.dump(path)
    label(segmentor, tmp_path / 'reduced', score=0.0)
    for written in sorted((tmp_path / 'plain').rglob('*.png')):
        other = tmp_path / 'reduced' / written.relative_to(tmp_path / 'plain')
        assert (np.array(Image.open(other)) == np.array(Image.open(written)) + 1).all()
    assert plain.first == 0


def test_two_images_of_one_label_map(segmentor, tmp_path):
    images = segmentor[2]
    first = sorted(images.rglob('*.png'))[0]
    Image.open(first).save(first.with_suffix('.jpg'))
    with pytest.raises(ConfigError, match=f'two images would have the label map .*{first.stem}.png'):
        label(segmentor, tmp_path / 'out')
