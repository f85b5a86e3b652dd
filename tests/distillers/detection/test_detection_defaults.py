"""The defaults of the methods for detectors, beside where each is from; the pages in ``docs/methods`` say more."""

import inspect
import re
from pathlib import Path

import pytest

from mmkd.registry import DISTILLERS

PAPER = 'paper'
QUOTED = 'paper, as quoted in reading notes'
CODE = "authors' code"
MEMORY = 'paper, from memory, unverified'
OURS = 'choice of this project'
CONV3 = dict(type='ConvAdapter', kernel_size=3)
MIMIC = [
    ('feature_weight', 1.0, 'United-Perception, of the same laboratory; ' + MEMORY),
    ('cls_weight', 0.0, f'{OURS}: the weight of the second stage is not known'),
    ('bbox_weight', 0.0, f'{OURS}: the weight of the second stage is not known'),
    ('proposals', 'student', QUOTED),
    ('topk', 100, f'{OURS}: the paper has no one-stage student'),
    ('pooled_size', 7, "mmdet's RoI heads"),
    ('sampling_ratio', 2, OURS),
    ('adapter', 'auto', OURS),
]
# What names a layer or a module has the name that mmdet gives it, and is listed in MODULES.
DEFAULTS = {
    'Mimic': MIMIC,
    'QuantizationMimic': [
        ('step', None, f'{OURS}: the step of the paper is not known, so it is derived'),
        ('quantization_levels', 16, OURS),
        ('signed', True, f'{OURS}: the outputs of an FPN are signed; the paper has features after a ReLU'),
    ],
    'GID': [
        ('topk', 10, f'{QUOTED}; {CODE}'),
        ('nms_iou', 0.3, f'{QUOTED}; {CODE}'),
        ('nms_pre', 3000, CODE),
        ('min_box_side', 0.0, f'{OURS}; {CODE}: 10'),
        ('feature_weight', 5e-4, f'{CODE}, all shipped configs'),
        ('relation_weight', 40.0, f'{CODE}, all shipped configs'),
        ('cls_weight', 0.1, CODE),
        ('bbox_weight', 1.0, CODE),
        ('relation', 'image', f'{PAPER}; {CODE}: over the batch'),
        ('feature_distance', 'squared_l2', f'{CODE}, whose weight belongs to it; {PAPER}: l2'),
        ('pooled_size', 10, CODE),
        ('sampling_ratio', 2, CODE),
        ('adapter', 'auto', OURS),
    ],
    'Chen': [
        ('rpn_cls_weight', 1.0, f'(1 - mu) / mu with mu = 0.5: {MEMORY}'),
        ('rpn_bbox_weight', 0.5, f'nu: {MEMORY}'),
        ('cls_weight', 1.0, f'lambda (1 - mu) / mu; lambda = 1: {QUOTED}; mu = 0.5: {MEMORY}'),
        ('bbox_weight', 0.5, f'lambda nu; nu = 0.5: {MEMORY}'),
        ('hint_weight', 0.5, f'gamma: {QUOTED}'),
        ('margin', 0.0, f'{OURS}: the margin of the paper is not known, 0 is common'),
        ('bg_cls_weight', 1.5, QUOTED),
        ('tau', 1.0, QUOTED),
        ('adapter', dict(type='ConvAdapter'), f'{QUOTED}: 1x1, for equal channels too'),
    ],
    'GDetKD': [
        ('sgfi_weight', 1.0, 'independent port (LutingWang/HEAD)'),
        ('ckd_weight', 0.5, 'independent port (LutingWang/HEAD)'),
        ('cls_weight', 0.0, f'{OURS}: the paper has it on, with a weight that is not known'),
        ('bbox_weight', 0.0, f'{OURS}: the paper has it on, with a weight that is not known'),
        ('tau', 16.0, f"{OURS}: the square root of a key's length"),
        ('hidden_channels', 128, 'independent port (LutingWang/HEAD)'),
        ('key_channels', 64, 'independent port (LutingWang/HEAD)'),
        ('ckd_tau', 0.07, 'independent port (LutingWang/HEAD)'),
        ('projection_channels', None, "independent port (LutingWang/HEAD): as many as the teacher's"),
        ('memory', 10240, 'independent port (LutingWang/HEAD): ten batches'),
        ('keys_per_step', 512, OURS),
        ('max_overlap', 0.5, 'independent port (LutingWang/HEAD)'),
        ('regions_per_image', 512, 'independent port (LutingWang/HEAD)'),
        ('candidates', 1000, OURS),
        ('positive_fraction', 0.25, QUOTED),
        ('positive_iou', 0.5, QUOTED),
        ('adapter', 'auto', 'independent port (LutingWang/HEAD): 1x1'),
    ],
    'ERD': [
        ('alpha', 2.0, f'{CODE}, where it is a number and no option'),
        ('tau', 10.0, CODE),
        ('nms_iou', 0.005, CODE),
        ('cls_weight', 2.0, f'{CODE}: 1, of a sum over the 2 images of a process'),
        ('bbox_weight', 0.5, f'{CODE}: 0.25, of a sum over the 2 images of a process'),
    ],
    'HEAD': [
        ('assistant_weight', 1.0, CODE),
        ('akd_weight', dict(type='linear', value=2.0, end=2000), CODE),
        ('ckd_weight', dict(type='linear', value=2.0, end=2000), CODE),
        ('regions_per_image', 512, "mmdet's RoI heads"),
        ('candidates', 1000, OURS),
        ('adapter', 'auto', f'{OURS}; {CODE} has equal channels'),
    ],
    'FGFI': [
        ('psi', 0.5, f'{QUOTED}; {CODE}'),
        ('levels', 'best', OURS),
        ('loss_weight', dict(type='constant', value=0.01, begin=400), CODE),
        ('adapter', dict(type='ConvAdapter', kernel_size=3, relu=True, init_std=1e-4), CODE),
    ],
    'DeFeat': [
        ('object_weight', 4.0, f'{CODE}: its author, of COCO'),
        ('background_weight', 16.0, f'{CODE}: its author, of COCO'),
        ('cls_object_weight', 2.0, f'{CODE}, VOC'),
        ('cls_background_weight', 2.0, f'{CODE}, VOC'),
        ('tau', 1.0, f'{CODE}, VOC'),
        ('adapter', CONV3, CODE),
    ],
    'FRS': [
        ('feature_weight', dict(type='linear', value=0.005, end=500), f'{CODE}, RetinaNet'),
        ('cls_weight', dict(type='linear', value=0.02, end=500), f'{CODE}, RetinaNet'),
        ('adapter', CONV3, CODE),
    ],
    'FGD': [
        ('foreground_weight', 1e-3, f'alpha: {PAPER} and {CODE}, RetinaNet'),
        ('background_weight', 5e-4, f'beta: {PAPER} and {CODE}, RetinaNet'),
        ('attention_weight', 1e-3, f'gamma: {PAPER}, RetinaNet; {CODE}: 5e-4'),
        ('global_weight', 5e-6, f'lambda: {PAPER} and {CODE}, RetinaNet'),
        ('tau', 0.5, f'T: {PAPER} and {CODE}'),
        ('adapter', 'auto', f'{CODE}: 1x1 where channels differ'),
        ('match', 'stride', OURS),
    ],
    'PGD': [
        ('foreground_weight', 0.04, f'alpha: {CODE}, FCOS and GFL'),
        ('background_weight', 0.02, f'beta: {CODE}, half of alpha'),
        ('bbox_weight', 0.064, f'gamma: {CODE}, 1.6 alpha'),
        ('attention_weight', 8e-4, f'delta: {CODE}'),
        ('topk', 30, CODE),
        ('cls_share', 0.8, CODE),
        ('bbox_share', 0.6, CODE),
        ('tau', 0.8, CODE),
        ('adapter', 'auto', f'{OURS}; {CODE} has equal channels'),
    ],
    'BCKD': [
        ('cls_weight', 1.0, f'{CODE}, GFL'),
        ('bbox_weight', 4.0, f'{CODE}, GFL'),
    ],
    'CrossKD': [
        ('position', 3, QUOTED),
        ('cls_weight', 1.0, QUOTED),
        ('bbox_weight', 1.0, f'{QUOTED}, heads without distributions'),
        ('adapter', 'auto', OURS),
    ],
    'LD': [
        ('tau', 10.0, f'{PAPER} and {CODE}'),
        ('kd_tau', 2.0, CODE),
        ('ld_weight', 0.25, CODE),
        ('ld_vlr_weight', 0.25, f'{CODE}, whose region is another one than that of the paper'),
        ('kd_weight', 10.0, f'{CODE}, where it weighs a sum of means over levels'),
        ('gamma', 0.25, CODE),
        ('normalize', 'images', f'{OURS}; {CODE}: none'),
        ('kd_mean', 'all', f'{OURS}; {CODE}: level'),
        ('over_bins', 'mean', CODE),
    ],
    'FreeKD': [
        ('loss_weight', 1.0, f'{CODE}, in the shipped config for RetinaNet'),
        ('tokens', 6, f'{CODE}, in the shipped configs'),
        ('token_steps', 2000, f"{OURS}: that of MasKD's code, as the first training is not in this one's"),
        ('adapter', 'auto', OURS),
    ],
    'ICD': [
        ('loss_weight', 8.0, f'lambda: {CODE}, one-stage detectors; its first 1000 steps are a schedule'),
        ('aux_weight', 1.0, CODE),
        ('max_instances', 300, f'{CODE}; 100 in the config for Faster R-CNN'),
    ],
    'LGD': [('loss_weight', 1.0, f'lambda: {CODE}, all shipped configs, which begin with it late')],
    'LabelEnc': [('loss_weight', 1.0, f'{CODE}, in both trainings')],
}
MODULES = {'layer', 'head', 'rpn_head', 'roi_head', 'stage', 'hint_layer', 'embedding_layer', 'mimic'}
MODULES |= {'teacher_layer', 'teacher_head', 'teacher_hint_layer', 'teacher_stage'}


@pytest.mark.parametrize('method', DEFAULTS)
def test_every_default_is_that_of_its_source(method):
    options = inspect.signature(DISTILLERS.get(method)).parameters
    found = {name: each.default for name, each in options.items() if name not in MODULES}
    assert found == {option: value for option, value, _ in DEFAULTS[method]}
    assert all(source for _, _, source in DEFAULTS[method])


@pytest.mark.parametrize('method', DEFAULTS)
def test_the_page_of_a_method_explains_every_default(method):
    kind = DISTILLERS.get(method)
    name = kind.__module__.rpartition('.')[2]
    assert f'docs/methods/{name}.md' in kind.__doc__
    page = (Path(__file__).parents[3] / 'docs' / 'methods' / f'{name}.md').read_text()
    assert [option for option, _, _ in DEFAULTS[method] if not re.search(rf'`{option}\b', page)] == []
    assert len(kind.__doc__.partition('Args:')[0].split()) < 200


def test_all_methods_for_detectors_are_in_the_table():
    detection = [name for name, each in DISTILLERS.module_dict.items() if '.detection.' in each.__module__]
    assert sorted(detection) == sorted(DEFAULTS)
