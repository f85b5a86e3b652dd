"""The promises: the student stays itself."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmkd.distill import distill
from mmkd.distillers import Distiller
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))


def build(teacher_options, distillers=METHODS, student=None, load=True):
    model = distill(student or detectors.retinanet(), teacher_options, distillers)
    if load:
        model.init_weights()
    return model


def losses(model, objects=4, shape=(2, 3, 96, 128)):
    batch = model.data_preprocessor(random_batch(model, shape, objects), True)
    return model(**batch, mode='loss')


def test_a_distilled_retinanet_is_a_retinanet(teacher_options):
    from mmdet.models import RetinaNet

    model = build(teacher_options, load=False)
    assert isinstance(model, RetinaNet)
    assert type(model).__name__ == 'DistilledRetinaNet'
    assert type(build(teacher_options, load=False)) is type(model)


def test_state_dict_has_exactly_the_plain_keys_without_adapters(teacher_options):
    """Of the demo's size here and of the COCO config in test_configs.py."""
    same = dict(config=detectors.retinanet(), checkpoint='unused')
    model = build(same, load=False)
    assert list(model.state_dict()) == list(models.build(detectors.retinanet()).state_dict())


def test_adapters_stand_beside_the_plain_keys(teacher_options):
    plain = set(models.build(detectors.retinanet()).state_dict())
    own = set(build(teacher_options, load=False).state_dict()) - plain
    adapters = {f'distillers.gid.adapters.0.conv.{name}' for name in ('weight', 'bias')}
    adapters |= {
        f'distillers.cwd.levels.adapters.{level}.conv.{name}' for level in range(3) for name in ('weight', 'bias')
    }
    assert own == adapters


def test_adapters_of_0_1_are_found_under_their_old_names(teacher_options):
    saved = build(teacher_options, load=False).state_dict()
    old = {key.replace('cwd.levels.adapters', 'cwd.adapters'): value for key, value in saved.items()}
    assert old.keys() != saved.keys()
    model = build(teacher_options, load=False)
    model.load_state_dict(old)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=0)


def test_nothing_of_the_teacher_is_found_in_the_student(teacher_options):
    model = build(teacher_options)
    teachers = {
        id(each) for each in (*model.sources['teacher'].model.parameters(), *model.sources['teacher'].model.buffers())
    }
    assert teachers
    assert not teachers & {id(each) for each in (*model.parameters(), *model.buffers())}
    assert not {id(each) for each in model.sources['teacher'].model.modules()} & {id(each) for each in model.modules()}
    optimizer = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
    optimised = [each for group in optimizer.optimizer.param_groups for each in group['params']]
    assert not teachers & {id(each) for each in optimised}
    average = ExponentialMovingAverage(model)
    assert average.module.sources['teacher'] is model.sources['teacher']
    assert set(average.module.state_dict()) == set(model.state_dict())


def test_a_run_leaves_the_teachers_weights_bit_identical(teacher_options):
    model = build(teacher_options).train()
    before = copy.deepcopy(model.sources['teacher'].model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.parse_losses(losses(model))[0].backward()
        optimizer.step()
        model.train()
    after = model.sources['teacher'].model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in model.sources['teacher'].model.modules())


def test_moving_the_student_moves_the_teacher(teacher_options):
    model = build(teacher_options).double()
    assert next(model.sources['teacher'].model.parameters()).dtype is torch.float64


def test_losses_are_logged_by_name_and_added_to_the_students(teacher_options):
    model = build(teacher_options)
    found = losses(model)
    assert list(found) == [
        'loss_cls',
        'loss_bbox',
        'gid.loss_feature',
        'gid.loss_relation',
        'gid.loss_cls',
        'gid.loss_bbox',
        'gid.instances',
        'cwd.loss',
    ]
    total, _ = model.parse_losses(found)
    optimised = [value for name, value in found.items() if name != 'gid.instances']
    expected = sum(sum(value) if isinstance(value, list) else value for value in optimised)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize('objects', [0, 1])
def test_every_parameter_gets_a_finite_gradient(teacher_options, objects):
    """Also for images without objects: DDP needs no find_unused_parameters."""
    model = build(teacher_options).train()
    model.parse_losses(losses(model, objects))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_losses_are_float32_under_autocast(teacher_options):
    model = build(teacher_options)
    expected = losses(model)
    with torch.autocast('cpu', torch.bfloat16):
        found = losses(model)
    methods = [name for name in found if name.startswith(('gid.loss', 'cwd.loss'))]
    assert len(methods) == 5
    assert all(found[name].dtype is torch.float32 for name in methods)
    # GID selects instances by scores, and rounding them in bf16 selects others
    torch.testing.assert_close(found['cwd.loss'], expected['cwd.loss'], rtol=0.1, atol=0.01)


class Gram(nn.Module):
    student_layers = teacher_layers = ('bbox_head.retina_cls',)

    def forward(self, student, teacher, data_samples):
        (level,) = student['bbox_head.retina_cls'][:1]
        return {'loss': (level.flatten(1) @ level.flatten(1).T).mean()}


def test_matrix_products_of_a_loss_are_not_autocast(teacher_options):
    model = build(teacher_options, dict(own=dict(type=f'{__name__}.Gram')))
    with torch.autocast('cpu', torch.bfloat16):
        assert losses(model)['own.loss'].dtype is torch.float32


def test_predictions_and_tensors_are_those_of_the_plain_student(teacher_options):
    model = build(teacher_options).eval()
    plain = models.build(detectors.retinanet()).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if 'distillers' not in name})
    batch = plain.data_preprocessor(random_batch(plain, (2, 3, 96, 128)), False)
    with torch.no_grad():
        found, expected = (each(**copy.deepcopy(batch), mode='predict') for each in (model, plain))
    for one, other in zip(found, expected):
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)


def test_testing_needs_no_teacher_weights(teacher_options):
    model = build(dict(config=teacher_options['config'], checkpoint='/nowhere.pth'), load=False).eval()
    batch = model.data_preprocessor(random_batch(model, (1, 3, 96, 128)), False)
    assert len(model(**batch, mode='predict')) == 1


def test_testing_leaves_the_teacher_off_the_device(teacher_options):
    model = build(teacher_options, load=False).double()
    assert next(model.sources['teacher'].model.parameters()).dtype is torch.float32


@MODELS.register_module()
class PerImage(nn.Module):
    """Calls its backbone once per image, so that the number of calls is the size of the batch."""

    def __init__(self):
        super().__init__()
        self.backbone, self.data_preprocessor = nn.Conv2d(3, 2, 1), nn.Module()

    def extract_feat(self, images):
        return [self.backbone(image[None]) for image in images]


class OnBackbone(Distiller):
    student_layers = teacher_layers = ('backbone',)


def test_a_layer_that_is_called_once_per_image_does_not_end_the_pass_early(teacher_options):
    model = distill(PerImage(), dict(config=dict(type='PerImage')), dict(own=dict(type=f'{__name__}.OnBackbone')))
    assert model.sources['teacher'].calls is None
    assert build(teacher_options, load=False).sources['teacher'].calls == {'neck': 1, 'bbox_head': 1}


@pytest.mark.slow
def test_a_segmentor_learns_as_a_detector_does(tmp_path):
    """mmseg keeps its data preprocessor at the config's top level and calls `self.forward` in its heads."""
    from mmengine.hub import get_config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    with DefaultScope.overwrite_default_scope('mmseg'):
        student = get_config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py').model
        student.pretrained = None
        plain = MODELS.build(student)
        torch.save(plain.state_dict(), tmp_path / 'teacher.pth')
        teacher = dict(config=student, checkpoint=str(tmp_path / 'teacher.pth'))
        model = distill(
            student, teacher, dict(cwd=dict(type='CWD', layer='decode_head.conv_seg', tau=4, loss_weight=3))
        )
        model.init_weights()
        with pytest.raises(ConfigError, match="'decode_head' .*never called.*decode_head.conv_seg"):
            distill(student, teacher, dict(cwd=dict(type='CWD', layer='decode_head')))
    assert list(model.state_dict()) == list(plain.state_dict())
    labels = PixelData(data=torch.randint(0, 19, (1, 64, 128)))
    samples = [SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(64, 128))) for _ in range(2)]
    found = revert_sync_batchnorm(model).train()(torch.randn(2, 3, 64, 128), samples, mode='loss')
    model.parse_losses(found)[0].backward()
    assert found['cwd.loss'] > 0
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0


def test_initial_weights_and_random_state_do_not_depend_on_the_teacher(teacher_options):
    torch.manual_seed(7)
    plain = models.build(detectors.retinanet())
    plain.init_weights()
    after = torch.rand(3)
    torch.manual_seed(7)
    model = build(teacher_options)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    assert torch.equal(torch.rand(3), after)


def test_a_top_level_data_preprocessor_goes_to_the_student(teacher_options):
    student = detectors.retinanet()
    preprocessor = student.pop('data_preprocessor')
    model = distill(student, teacher_options, METHODS, data_preprocessor=dict(preprocessor, mean=[1.0, 2.0, 3.0]))
    assert model.data_preprocessor.mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert model.sources['teacher']._renormalize is not None


def test_it_is_built_from_a_config_by_its_name(teacher_options):
    config = Config(
        dict(
            model=dict(type='mmkd.Distill', student=detectors.retinanet(), teacher=teacher_options, distillers=METHODS)
        )
    )
    assert type(MODELS.build(config.model)).__name__ == 'DistilledRetinaNet'


class Foreign(nn.Module):
    """A method that knows nothing of mmkd."""

    student_layers = teacher_layers = ('bbox_head.retina_cls',)

    def forward(self, student, teacher, data_samples):
        levels = zip(student['bbox_head.retina_cls'], teacher['bbox_head.retina_cls'])
        return {'loss': sum((s - t).abs().mean() for s, t in levels)}


def test_a_method_from_any_package_by_its_dotted_path(teacher_options):
    model = build(teacher_options, dict(own=dict(type=f'{__name__}.Foreign')))
    assert losses(model)['own.loss'] > 0


class Misnamed(Distiller):
    def forward(self, student, teacher, data_samples):
        return {'my_loss': torch.zeros(())}


def test_a_statistic_must_not_look_like_a_loss(teacher_options):
    model = build(teacher_options, dict(own=dict(type=f'{__name__}.Misnamed')))
    with pytest.raises(ConfigError, match="'my_loss' contains 'loss'"):
        losses(model)


def test_a_frozen_layer_is_not_distilled_silently(teacher_options):
    student = detectors.retinanet(backbone=dict(frozen_stages=1))
    model = build(
        dict(config=detectors.retinanet()), dict(cwd=dict(type='CWD', layer='backbone.layer1')), student, load=False
    )
    model.sources['teacher'].loaded = True  # with random weights
    with pytest.raises(ConfigError, match='no gradient'):
        losses(model.train())


@pytest.mark.parametrize(
    ('distillers', 'message'),
    [
        (dict(cwd=dict(type='CWD', layer='nekc')), "layer 'nekc': RetinaNet has no such module.*'neck'"),
        (dict(cwd=dict(type='CWD', layer='bbox_head.loss_cls')), 'never called'),
        (dict(cwd=dict(type='CWD', layer='backbone.bn1')), 'changed in place'),
        (dict(cwd=dict(type='CWD', layer='neck', taus=4)), "CWD has no option 'taus'; the nearest are 'tau'"),
        (dict(gid=dict(type='GID', top_k=4)), "GID has no option 'top_k'; the nearest are 'topk'"),
        (dict(gid=dict(type='GIDD')), "no distiller 'GIDD'; the nearest are 'GID'"),
        (dict(cwd=dict(type='CWD')), 'distillers.cwd: CWD needs layer'),
        (dict(cwd=dict(type='CWD', layer='neck', tau=0)), 'distillers.cwd: tau=0'),
        (
            dict(cwd=dict(type='CWD', layer='neck', adapter=None)),
            'distillers.cwd: .*16 and 24 channels with adapter=None',
        ),
        (dict(cwd=dict(type='CWD', layer='neck', teacher_layer='backbone', match='index')), 'have 3 and 4 levels'),
        (
            dict(cwd=dict(type='CWD', layer='backbone.layer2', teacher_layer='backbone.layer3', adapter=None)),
            'with adapter=None',
        ),
        (dict(my_loss=dict(type='GID')), "distillers.my_loss: a name .* must not contain 'loss'"),
        (dict(forward=dict(type='GID')), 'distillers.forward: .*choose another'),
        (dict(cwd=dict(type='CWD', layer='bbox_head')), "'bbox_head' puts out a tuple .*'bbox_head.retina_cls'"),
        (
            dict(cwd=dict(type='CWD', layer='neck', adapter=dict(type='ConvAdaptr'))),
            "no adapter 'ConvAdaptr'; .*'ConvAdapter'",
        ),
        (dict(cwd=dict(type='CWD', layer='neck', tau='1')), "tau='1'"),
        (dict(own=dict(type='nowhere.Method')), 'cannot import nowhere'),
        (dict(own=dict(type='mmkd.taps.Nothing')), "module mmkd.taps has no 'Nothing'"),
        (dict(own=dict(type='torch.nn.Identity')), "Identity has no attribute 'student_layers'"),
        ({}, r'expected a dict such as dict\(gid'),
        ([dict(type='GID')], r'expected a dict such as dict\(gid'),
        (dict(gid='GID'), 'expected a dict with type'),
    ],
)
def test_bad_distillers_are_one_clear_line(teacher_options, distillers, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(teacher_options, distillers, load=False)
    assert '\n' not in str(error.value)


def test_logits_of_different_classes_are_refused(teacher_options):
    student = detectors.retinanet(classes=5)
    with pytest.raises(ConfigError, match='distillers.gid: .*5 .student. and 3 .teacher. classes'):
        build(teacher_options, dict(gid=dict(type='GID')), student, load=False)
    with pytest.raises(ConfigError, match='distillers.cwd: .*logits of 5 classes, .*of the teacher of 3'):
        build(teacher_options, dict(cwd=dict(type='CWD', layer='bbox_head.retina_cls')), student, load=False)
    build(teacher_options, dict(cwd=dict(type='CWD', layer='neck')), student, load=False)  # features may be compared
