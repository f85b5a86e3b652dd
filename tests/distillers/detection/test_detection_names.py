"""Options of 0.1 are still there, or name the option that took their place."""

import inspect
import re

import pytest

from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build

MIMIC = 'neck head roi_head stage proposals topk weight class_weight box_weight adapter pooled_size sampling_ratio teacher_neck'
OPTIONS_OF_0_1 = {
    'Chen': 'neck rpn_head roi_head stage mu nu margin background_weight temperature rcn_weight hint_weight hint_layer adapter '
    'teacher_neck teacher_hint_layer',
    'FGD': 'layer foreground_weight background_weight attention_weight global_weight temperature teacher_layer adapter match',
    'FGFI': 'neck head psi levels weight adapter teacher_neck',
    'FRS': 'neck head feature_weight class_weight adapter teacher_neck teacher_head',
    'GDetKD': 'neck head roi_head stage tower weight contrast_weight class_weight box_weight tau hidden_channels key_channels '
    'contrast_tau projection_channels memory keys_per_step max_overlap regions candidates positive_fraction positive_iou '
    'adapter teacher_neck',
    'GID': 'neck head topk nms_iou nms_pre min_box_side feature_weight relation_weight class_weight box_weight relation '
    'feature_distance pooled_size sampling_ratio adapter teacher_neck teacher_head',
    'LD': 'head tau class_tau weight valuable_weight class_weight gamma normalise class_mean over_bins teacher_head',
    'Mimic': MIMIC,
    'QuantizationMimic': f'{MIMIC} step levels signed',
}
# what every method calls so, whatever it was called before
SAME = {
    'neck': 'layer',
    'teacher_neck': 'teacher_layer',
    'class_weight': 'cls_weight',
    'box_weight': 'bbox_weight',
    'temperature': 'tau',
    'normalise': 'normalize',
}
OTHER = {
    ('FGFI', 'weight'): 'loss_weight',
    ('Mimic', 'weight'): 'feature_weight',
    ('QuantizationMimic', 'weight'): 'feature_weight',
    ('QuantizationMimic', 'levels'): 'quantization_levels',
    ('LD', 'weight'): 'ld_weight',
    ('LD', 'valuable_weight'): 'ld_vlr_weight',
    ('LD', 'class_weight'): 'kd_weight',
    ('LD', 'class_tau'): 'kd_tau',
    ('LD', 'class_mean'): 'kd_mean',
    ('GDetKD', 'weight'): 'sgfi_weight',
    ('GDetKD', 'contrast_weight'): 'ckd_weight',
    ('GDetKD', 'contrast_tau'): 'ckd_tau',
    ('GDetKD', 'tower'): 'embedding_layer',
    ('GDetKD', 'regions'): 'regions_per_image',
    ('Chen', 'mu'): 'cls_weight = rpn_cls_weight = (1 - mu) / mu',
    ('Chen', 'nu'): 'bbox_weight and rpn_bbox_weight',
    ('Chen', 'rcn_weight'): 'cls_weight and bbox_weight',
    ('Chen', 'background_weight'): 'bg_cls_weight',
}


def options(method):
    """All options of a method, those that it hands on to Mimic among them."""
    found = set(inspect.signature(DISTILLERS.get(method)).parameters)
    return found | set(inspect.signature(DISTILLERS.get('Mimic')).parameters) if 'mimic' in found else found


@pytest.mark.parametrize(
    ('method', 'old'), [(method, old) for method, names in OPTIONS_OF_0_1.items() for old in names.split()]
)
def test_an_old_option_is_there_or_names_the_new_one(method, old):
    new = OTHER.get((method, old), SAME.get(old, old))
    assert set(re.findall(r'[a-z_]+', new)) - {'and', 'mu'} <= options(method)
    if new == old:
        assert old not in DISTILLERS.get(method).renamed
        return
    with pytest.raises(ConfigError) as error:
        build(DISTILLERS, 'distillers.it', {'type': method, old: 1})
    assert str(error.value) == f'distillers.it: {method} calls {old!r} {new!r} now'


@pytest.mark.parametrize(
    ('method', 'given'),
    [
        ('Chen', dict(teacher_layer='n', teacher_hint_layer=['h.0'], hint_layer=['h.1'])),
        ('FGD', dict(teacher_layer='n')),
        ('FGFI', dict(teacher_layer='n')),
        ('FRS', dict(teacher_layer='n', teacher_head='d')),
        ('GDetKD', dict(teacher_layer='n')),
        ('GID', dict(teacher_layer='n', teacher_head='d')),
        ('LD', dict(teacher_head='d')),
        ('Mimic', dict(teacher_layer='n')),
        ('QuantizationMimic', dict(teacher_layer='n')),
    ],
)
def test_the_teachers_layers_are_those_that_are_named_so(method, given):
    teacher_options = {option: given.get(option) for option in options(method) if option.startswith('teacher_')}
    assert {option for option, value in teacher_options.items() if value is None} <= {'teacher_stage'}
    distiller = build(DISTILLERS, 'distillers.it', {'type': method, **given})
    wanted = {'n'} if 'teacher_layer' in given else set()
    wanted |= {'d'} if 'teacher_head' in given else set()
    wanted |= {'h.0', 'rpn_head'} if method == 'Chen' else set()
    assert set(distiller.teacher_layers) == wanted
    assert not wanted - {'rpn_head'} & set(distiller.student_layers)
