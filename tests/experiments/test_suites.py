"""Which score ranks the models of a user's configs."""

import pytest
from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.suites import of_folder, score_key


def config(evaluator, **checkpoint):
    return Config(
        dict(val_evaluator=evaluator, default_hooks=dict(checkpoint=dict(type='CheckpointHook', **checkpoint)))
    )


@pytest.mark.parametrize(
    ('evaluator', 'key'),
    [
        (dict(type='CocoMetric', metric='bbox'), 'coco/bbox_mAP'),
        (dict(type='mmdet.CocoMetric', metric=['segm', 'bbox'], prefix='cells'), 'cells/segm_mAP'),
        (dict(type='CocoMetric'), 'coco/bbox_mAP'),
        (dict(type='VOCMetric', metric='mAP'), 'pascal_voc/mAP'),
        (dict(type='LVISMetric', metric='bbox'), 'lvis/bbox_AP'),
        (dict(type='IoUMetric', iou_metrics=['mDice', 'mIoU']), 'mDice'),
        ([dict(type='mine.Metric'), dict(type='IoUMetric')], 'mIoU'),
        (dict(type='Evaluator', metrics=[dict(type='IoUMetric')]), 'mIoU'),
    ],
)
def test_it_is_the_evaluators_main_score(evaluator, key):
    assert score_key(config(evaluator)) == key
    assert score_key(config(evaluator, save_best='auto')) == key


def test_it_is_the_score_of_the_best_checkpoint_if_the_config_has_one():
    coco = dict(type='CocoMetric')
    assert score_key(config(coco, save_best='coco/bbox_mAP_50')) == 'coco/bbox_mAP_50'
    assert score_key(config(coco, save_best=['mIoU', 'mAcc'], rule='greater')) == 'mIoU'
    with pytest.raises(ConfigError, match='val_loss is better the smaller it is; .*--score'):
        score_key(config(coco, save_best='val_loss', rule='less'))


def test_one_that_is_not_known_has_to_be_named(tmp_path):
    unknown = config(dict(type='mine.Metric'))
    with pytest.raises(ConfigError, match='val_evaluator: its score is not known .*mine.Metric.*--score'):
        of_folder(tmp_path, {'a': unknown})
    suite = of_folder(tmp_path, {'a': unknown}, 'mine/accuracy')
    assert (suite.score.key, suite.score.name) == ('mine/accuracy', 'accuracy')
    assert of_folder(tmp_path, {'a': config(dict(type='CocoMetric'))}).score.name == 'AP'


def test_methods_of_one_comparison_have_one_score(tmp_path):
    both = {'a': config(dict(type='CocoMetric')), 'b': config(dict(type='IoUMetric'))}
    with pytest.raises(ConfigError, match=r'several scores, coco/bbox_mAP \(a\), mIoU \(b\); choose one'):
        of_folder(tmp_path, both)
