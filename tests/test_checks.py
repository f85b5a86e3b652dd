"""What is checked before the first iteration, as functions of a config."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config

from mmkd import checks
from mmkd.errors import ConfigError
from mmkd.hosts.datasets import dataset_class
from mmkd.hosts.mmengine import config_path
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import distilled, shapes_config, streets_config

NAMES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checks')
    shapes_config(folder, dict(type='RetinaNet'))
    streets_config(folder, dict(type='EncoderDecoder'))
    return folder


@pytest.fixture
def shapes(folder):
    return shapes_config(folder, distilled(folder, dict(cwd=dict(type='CWD', layer='neck'))))


def classes(config, names, part='train'):
    config[f'{part}_dataloader'].dataset.metainfo.classes = names


def teacher_says(config, folder, names, key='dataset_meta'):
    """Give the teacher's checkpoint other class names."""
    path = folder / 'renamed.pth'
    meta = dict(CLASSES=names) if key == 'CLASSES' else dict(dataset_meta=dict(classes=names))
    torch.save(dict(state_dict=torch.load(config.model.teacher.checkpoint)['state_dict'], meta=meta), path)
    config.model.teacher.checkpoint = str(path)


def test_a_right_config_passes_without_a_word(shapes):
    assert checks.check_config(shapes) == []


# weights that the student starts from


def test_pretrained_weights_are_found_anywhere_in_the_student():
    start = dict(type='Pretrained', checkpoint='a.pth')
    model = dict(
        pretrained='open-mmlab://resnet18_v1c',
        backbone=dict(init_cfg=[dict(type='Kaiming'), dict(start)], pretrained=True),
        decode_head=[dict(init_cfg=dict(start, checkpoint='b.pth')), dict(init_cfg=None)],
        detector=dict(init_cfg=dict(start, checkpoint='c.pth'), backbone=dict(init_cfg=start)),
    )
    assert dict(checks.pretrained(model, 'model.student')) == {
        'model.student.pretrained': 'open-mmlab://resnet18_v1c',
        'model.student.backbone.init_cfg.1': 'a.pth',
        'model.student.decode_head.0.init_cfg': 'b.pth',
        'model.student.detector.init_cfg': 'c.pth',
    }


def test_of_what_a_student_learns_from_only_peers_start_from_pretrained_weights(shapes, folder, tmp_path):
    start = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    with_start = detectors.retinanet(classes=6, backbone=dict(init_cfg=start))
    frozen = dict(config=with_start, checkpoint=models.save_weights(detectors.retinanet(classes=6), tmp_path / 't.pth'))
    shapes.model.teacher = dict(large=frozen, mean=dict(type='Average'))
    assert checks.check_config(shapes) == []
    shapes.model.teacher.peer = dict(type='mmkd.Peer', config=with_start)
    with pytest.raises(ConfigError, match=r'^model.teacher.peer.config.backbone.init_cfg .*x.pth: no such file'):
        checks.check_config(shapes)
    shapes.model.teacher.peer = dict(type='Peer', config=detectors.retinanet(classes=2))
    with pytest.raises(ConfigError, match=r'^model.teacher.peer.config.bbox_head.num_classes=2'):
        checks.check_config(shapes)
    shapes.model.teacher.peer = dict(type='Peer', config=detectors.retinanet(classes=6), checkpoint='y.pth')
    with pytest.raises(ConfigError, match=r'^model.teacher.peer.checkpoint y.pth: no such file'):
        checks.check_config(shapes)
    shapes.model.teacher.pop('peer')
    shapes.model.teacher.large.checkpoint = 'z.pth'
    with pytest.raises(ConfigError, match=r'^teacher checkpoint z.pth: no such file'):
        checks.check_config(shapes)


def test_a_student_that_is_named(shapes, tmp_path):
    Config(dict(model=shapes.model.student)).dump(tmp_path / 'student.py')
    shapes.model.student = str(tmp_path / 'student.py')
    assert checks.check_config(shapes) == []
    shapes.train_dataloader.dataset.metainfo.classes = NAMES[:5]
    with pytest.raises(
        ConfigError, match=r'^model.student.bbox_head.num_classes=6: train_dataloader.dataset has 5 classes'
    ):
        checks.check_config(shapes)


def test_pretrained_weights_that_are_not_there(shapes, tmp_path):
    shapes.model.student.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    with pytest.raises(
        ConfigError,
        match=r'^model.student.backbone.init_cfg .*x.pth: no such file .*; put it there, or start without: --cfg-options '
        r'model.student.backbone.init_cfg=None',
    ):
        checks.check_config(shapes)
    (tmp_path / 'x.pth').write_bytes(b'')
    checks.check_pretrained(shapes)
    shapes.model.student.backbone.init_cfg.checkpoint = 's3://bucket/x.pth'  # mmengine's business
    checks.check_pretrained(shapes)


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (lambda path: None, 'no such file'),
        (lambda path: path.write_bytes(b'PK\x03\x04'), 'truncated|damaged'),
        (lambda path: torch.save(dict(a=torch.zeros(2)), path), 'fits nothing of RetinaNet; it holds a, ...'),
    ],
)
def test_a_checkpoint_to_begin_with_that_cannot_be_used(shapes, tmp_path, write, message):
    write(tmp_path / 'start.pth')
    shapes.load_from = str(tmp_path / 'start.pth')
    check = checks.check_model if 'fits' in message else checks.check_checkpoint
    arguments = [shapes, models.build(shapes.model.student)] if 'fits' in message else [shapes]
    with pytest.raises(ConfigError, match=f'^load_from .*start.pth: .*({message})'):
        check(*arguments)


def test_a_checkpoint_is_called_what_it_is_for(shapes):
    shapes.load_from = 'nowhere.pth'
    with pytest.raises(ConfigError, match='^checkpoint nowhere.pth: no such file'):
        checks.check_checkpoint(shapes, 'checkpoint')
    with pytest.raises(ConfigError, match='^load_from nowhere.pth: no such file'):
        checks.check_checkpoint(shapes)


def test_a_training_may_begin_with_a_part_of_its_weights(shapes, tmp_path):
    model = models.build(shapes.model.student)
    state = {name: value for name, value in model.state_dict().items() if name.startswith('backbone.')}
    torch.save(dict(state, head=torch.zeros(2)), tmp_path / 'start.pth')
    shapes.load_from = str(tmp_path / 'start.pth')
    assert checks.check_model(shapes, model) == []
    with pytest.raises(
        ConfigError, match=r'^checkpoint .* does not fit RetinaNet: \d+ missing .*; 1 unexpected \(head\)'
    ):
        checks.check_fit(shapes, model)  # but is not tested with a part


def test_a_teacher_whose_weights_cannot_be_read_is_found_before_data_are(shapes, tmp_path):
    (tmp_path / 't.pth').write_bytes(b'<html>')
    shapes.model.teacher.checkpoint = str(tmp_path / 't.pth')
    with pytest.raises(ConfigError, match=r'^teacher checkpoint .*t.pth: is no checkpoint of PyTorch, or damaged'):
        checks.check_config(shapes)
    torch.save(dict(state_dict=dict(epoch=3)), tmp_path / 't.pth')
    with pytest.raises(ConfigError, match=r'^teacher checkpoint .*t.pth: holds no weights'):
        checks.check_config(shapes)
    shapes.model.teacher.checkpoint = None
    with pytest.raises(
        ConfigError, match=r'^model.teacher: no checkpoint for RetinaNet; a teacher needs trained weights'
    ):
        checks.check_config(shapes)


# data


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(ann_file=None),
            r'^train_dataloader.dataset.ann_file: missing; CocoDataset reads its annotations from it',
        ),
        (
            dict(metainfo=dict(classes='circle')),
            r"^train_dataloader.dataset.metainfo.classes='circle': expected a tuple",
        ),
        (
            dict(metainfo=dict(classes=(*NAMES[1:], 'circle'))),
            r"metainfo.classes: .* write classes=\('circle', 'square'",
        ),
        (
            dict(metainfo=None),
            r"ann_file: .*train.json has none of COCO's categories; .*classes=\('circle', .*num_classes=6",
        ),
    ],
)
def test_data_that_mmdet_would_read_otherwise(shapes, change, message):
    shapes.train_dataloader.dataset.update(change)
    if change.get('metainfo', 0) is None:
        shapes.train_dataloader.dataset.pop('metainfo')
    with pytest.raises(ConfigError, match=message):
        checks.check_config(shapes)


def test_some_of_cocos_categories_are_numbered_from_0(shapes, tmp_path):
    """By mmdet, which would call 'cat', label 0, a person."""
    path = tmp_path / 'some.json'
    dataset = shapes.train_dataloader.dataset
    dataset.pop('metainfo')
    dataset.ann_file = str(path)
    for names, fits in ((('person', 'bicycle'), True), (('cat', 'dog'), False)):
        categories = [dict(id=index, name=name) for index, name in enumerate(names)]
        images = [dict(id=0, file_name='000000.jpg', width=96, height=96)]
        annotations = [dict(id=0, image_id=0, category_id=0, bbox=[1, 2, 30, 40], area=1200)]
        path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
        if fits:
            checks.check_data(shapes, ('train',))
        else:
            with pytest.raises(ConfigError, match=r"not as mmdet would number them; .*classes=\('cat', 'dog'\)"):
                checks.check_data(shapes, ('train',))


def test_types_may_be_classes(shapes):
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = shapes.train_dataloader.dataset
    dataset.type, dataset.pipeline[1].type = CocoDataset, LoadAnnotations
    assert checks.check_config(shapes) == []
    dataset.ann_file = ''
    with pytest.raises(ConfigError, match='ann_file: missing; CocoDataset'):
        checks.check_config(shapes)


def test_a_dataset_derived_from_coco_is_checked_as_coco_is(shapes):
    shapes.train_dataloader.dataset.type = 'DeepFashionDataset'  # inherits its reading
    classes(shapes, NAMES[::-1])
    with pytest.raises(ConfigError, match='not the order of the categories'):
        checks.check_config(shapes)


# classes


@pytest.mark.parametrize('key', ['dataset_meta', 'CLASSES'])
def test_a_teacher_with_the_same_classes_in_another_order(shapes, folder, key):
    teacher_says(shapes, folder, list(NAMES[::-1]), key)
    with pytest.raises(
        ConfigError,
        match=r"^model.teacher's checkpoint .*renamed.pth: class 0 is 'cross', and 'circle' in train_dataloader.dataset; the "
        r'same classes have to be in the same order',
    ):
        checks.check_config(shapes)


def test_a_teacher_whose_config_has_another_order(shapes, folder):
    teacher = Config(dict(model=shapes.model.teacher.config, train_dataloader=shapes.train_dataloader))
    teacher.default_scope = 'mmdet'
    classes(teacher, NAMES[::-1])
    teacher.dump(folder / 'teacher.py')
    classes(shapes, NAMES)
    shapes.model.teacher.config = str(folder / 'teacher.py')
    with pytest.raises(ConfigError, match=r"^model.teacher's config: class 0 is 'cross'"):
        checks.check_config(shapes)


def test_other_classes_are_worth_a_warning_where_there_are_as_many(shapes, folder):
    teacher_says(shapes, folder, [*NAMES[:5], 'moon'])
    (line,) = checks.check_config(shapes)
    assert "class 5 is 'moon', and 'cross' in train_dataloader.dataset" in line
    teacher_says(shapes, folder, NAMES[:0:-1])  # CWD of the neck may well be of other classes
    assert checks.check_config(shapes) == []


def test_the_classes_of_training_and_validation_are_in_one_order(folder):
    config = streets_config(folder, segmentors.pspnet())
    kind = dataset_class(config.train_dataloader.dataset, 'mmseg')
    config.val_dataloader.dataset.metainfo = dict(classes=kind.METAINFO['classes'][::-1])
    with pytest.raises(ConfigError, match=r"^val_dataloader.dataset: class 0 is 'bicycle', and 'road' in train"):
        checks.check_config(config)


@pytest.mark.parametrize(
    ('model', 'head', 'count'),
    [
        (detectors.retinanet(classes=6, bbox_head=dict(num_classes=2)), 'bbox_head', 2),
        (detectors.faster_rcnn(classes=80), 'roi_head.bbox_head', 80),
        (segmentors.pspnet(decode_head=dict(num_classes=2)), 'decode_head', 2),
        (segmentors.pspnet(auxiliary_head=dict(num_classes=150)), 'auxiliary_head', 150),
    ],
)
@pytest.mark.parametrize('teacher', [False, True])
def test_heads_have_as_many_classes_as_the_data(folder, model, head, count, teacher):
    make = streets_config if model.type == 'EncoderDecoder' else shapes_config
    config = make(folder, dict(type='mmkd.Distill', student=model, teacher='mmdet::x') if teacher else model)
    names = 19 if model.type == 'EncoderDecoder' else 6
    option = 'model.student.' if teacher else 'model.'
    with pytest.raises(
        ConfigError, match=rf'^{option}{head}.num_classes={count}: train_dataloader.dataset has {names} classes \('
    ):
        checks.check_heads(config)


def test_heads_in_lists_and_heads_of_other_classes(folder):
    head = dict(type='FCNHead', num_classes=19)
    boundary = dict(type='STDCHead', num_classes=2)
    config = streets_config(
        folder, dict(type='EncoderDecoder', auxiliary_head=[head, boundary], decode_head=[head, head])
    )
    checks.check_heads(config)
    config.model.decode_head[1].num_classes = 2
    with pytest.raises(ConfigError, match=r'^model.decode_head.1.num_classes=2'):
        checks.check_heads(config)
    checks.check_heads(shapes_config(folder, detectors.faster_rcnn(classes=6, rpn_head=dict(num_classes=1))))


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'mmdet::htc/htc_r50_fpn_1x_coco.py',  # a semantic head of 183 classes
        'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',  # 80 things, 133 classes
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
        'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py',  # 256 words
        'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',  # a head for boundaries
        'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',  # a cascade
        'mmseg::san/san-vit-b16_voc12aug-640x640.py',  # 20 words, 21 classes
    ],
)
def test_the_stock_heads_pass(name):
    checks.check_heads(get_config(name))


# keys


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
        'mmdet::vfnet/vfnet_r101_fpn_2x_coco.py',  # a head that inherits from two
        'mmdet::detr/detr_r50_8xb2-150e_coco.py',  # a loss with an option that its head takes out
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
        'mmdet::ssd/ssd300_coco.py',
        'mmseg::pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py',
        'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',  # a head that takes anything
        'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
        'mmkd::gid_retinanet.py',
        'mmkd::dakd_deeplabv3.py',
    ],
)
def test_stock_configs_have_no_key_too_many(name):
    config = Config.fromfile(config_path(name)) if name.startswith('mmkd') else get_config(name)
    checks.check_kinds(config)
    checks.check_names(config, ('train', 'val', 'test'))


# options that do not go together


def critics(config, *names):
    model = models.build(config.model.student)
    model.distillers = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({'critic': torch.nn.Linear(1, 1)}) for name in names}
    )
    return checks.check_model(config, model)


def test_a_critic_that_learns_at_the_students_rate(shapes):
    shapes.optim_wrapper.clip_grad = None
    assert critics(shapes) == []
    (line,) = critics(shapes, 'skd')
    assert "no key of optim_wrapper.paramwise_cfg.custom_keys is in its parameters' names (keys: [])" in line
    shapes.optim_wrapper.paramwise_cfg = dict(custom_keys={'distillers.skd.critic': dict(lr_mult=0.04)})
    assert critics(shapes, 'skd') == []
    line, unused = critics(shapes, 'renamed')
    assert unused == (
        'optim_wrapper.paramwise_cfg.custom_keys.distillers.skd.critic: in no name of a parameter, so it changes nothing.'
    )
    assert line.startswith("The critic of distillers.renamed learns at the student's rate")
    assert "add 'distillers.renamed.critic': dict(lr_mult=...)" in line
    shapes.optim_wrapper.clip_grad = dict(max_norm=10)
    (line,) = critics(shapes, 'skd')
    assert line.startswith('optim_wrapper.clip_grad takes one norm over the student and the critics of distillers.skd')


def test_another_batch_than_the_learning_rate_is_for(shapes):
    shapes.train_dataloader.batch_size = 2
    shapes.optim_wrapper.accumulative_counts = 4
    assert 'chosen for a batch of 4 images and this run has 8: ' in checks.compare_batch_size(shapes)[0]
    shapes.auto_scale_lr.enable = True
    assert checks.compare_batch_size(shapes) == []
