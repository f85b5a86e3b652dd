"""What holds for which method: one table, see METHODS."""

import pytest
import torch
from mmengine.registry import DefaultScope

from mmkd.distill import distill
from mmkd.distillers.schedule import Weight
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.properties import assert_close, assert_differentiable, assert_zero, losses

ALL = {'zero', 'batch', 'bf16', 'padding'}
PHASE = 'tokens learn first, then features are compared: one of the two is 0; test_maskd and test_freekd have the other'
UNBIASED = 'true up to the factor (n - 1) / n of the unbiased deviation, n the number of positions in the batch'
WHOLE = 'statistics are of the whole map'
OTHER = 'other networks or parts that are trained'
SELECTED = (
    'slots are selected by their scores, those in the padding too where their box reaches into the image, as mmdet does'
)
NO_NMS = 'mmcv has no NMS in bf16 on a CPU, so mmdet itself cannot run so there'
SAMPLED = 'the RoIs of a two-stage student are drawn at random and differ with the images around'
WHOLE = 'the whole map counts'
FEWER = 'of more images there are fewer cells each'
FLAT = 'differences of cells that are nearly alike are rounded'
TOKENS = "it is the loss of the teacher's heads, with what mmdet does"
TRAINED = 'parts that are trained'
DISTANCE = 'a distance over the batch grows with the root of the number of images'
DRAWN = 'regions are drawn at random'
FAKES = 'fake instances are drawn at random; test_icd has what is in the padding'
REMEMBERS = 'the second step reads what the first has left in the queue'
# method: (student, teacher, distiller, properties that do not hold and why)
METHODS = {
    'CWD': (
        'retinanet',
        'retinanet',
        dict(type='CWD', layer='neck'),
        {'padding': 'the softmax is over all positions, as published'},
    ),
    'CWD on class logits': (
        'gfl',
        'gfl',
        dict(type='CWD', layer='bbox_head.gfl_cls', loss_weight=5),
        {'padding': 'the softmax is over all positions, as published'},
    ),
    'KD RetinaNet': (
        'retinanet',
        'retinanet',
        dict(type='KD'),
        {'padding': 'slots of the padding count, as mmdet trains them'},
    ),
    'KD FCOS': ('fcos', 'fcos', dict(type='KD'), {'padding': 'slots of the padding count, as mmdet trains them'}),
    'KD GFL': ('gfl', 'gfl', dict(type='KD', tau=2.0), {'padding': 'slots of the padding count, as mmdet trains them'}),
    'KD RPN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='KD', layer='rpn_head'),
        {'bf16': NO_NMS, 'padding': 'slots of the padding count, as mmdet trains them'},
    ),
    'KD Faster R-CNN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='KD', loss_weight=100.0),
        {'batch': SAMPLED, 'bf16': NO_NMS, 'padding': SAMPLED},
    ),
    'GID RetinaNet': ('retinanet', 'retinanet', dict(type='GID'), {'bf16': SELECTED, 'padding': SELECTED}),
    'GID FCOS': ('fcos', 'fcos', dict(type='GID'), {'bf16': SELECTED, 'padding': SELECTED}),
    # boxes of random weights are as large as the image, and NMS would leave one
    'GID GFL': ('gfl', 'gfl', dict(type='GID', nms_iou=0.9), {'bf16': SELECTED, 'padding': SELECTED}),
    'GID ATSS': ('atss', 'atss', dict(type='GID'), {'bf16': SELECTED, 'padding': SELECTED}),
    'GID Faster R-CNN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='GID', head='rpn_head'),
        {'bf16': SELECTED, 'padding': SELECTED},
    ),
    'Mimic RetinaNet': (
        'retinanet',
        'retinanet',
        dict(type='Mimic', head='bbox_head'),
        {'bf16': SELECTED, 'padding': SELECTED},
    ),
    'Mimic across families': (
        'fcos',
        'faster_rcnn',
        dict(type='Mimic', head='bbox_head'),
        {'zero': OTHER, 'bf16': SELECTED, 'padding': SELECTED},
    ),
    'Mimic Faster R-CNN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='Mimic', cls_weight=1.0, bbox_weight=1.0),
        {'batch': SAMPLED, 'bf16': NO_NMS, 'padding': SAMPLED},
    ),
    'Quantization Mimic': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='QuantizationMimic'),
        {'batch': SAMPLED, 'bf16': NO_NMS, 'padding': SAMPLED},
    ),
    'Chen': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='Chen'),
        {
            'zero': 'its bound is a step, which rounding decides there; the adapter is always there',
            'batch': SAMPLED,
            'bf16': NO_NMS,
            'padding': SAMPLED,
        },
    ),
    'G-DetKD Faster R-CNN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='GDetKD'),
        {'zero': OTHER, 'batch': SAMPLED, 'bf16': NO_NMS, 'padding': SAMPLED},
    ),
    'G-DetKD RetinaNet': (
        'retinanet',
        'faster_rcnn',
        dict(type='GDetKD', head='bbox_head'),
        {'zero': OTHER, 'batch': 'more regions are more negatives', 'bf16': SELECTED, 'padding': SELECTED},
    ),
    'HEAD': (
        'retinanet',
        'faster_rcnn',
        dict(type='HEAD', akd_weight=2.0, ckd_weight=2.0),
        {'zero': OTHER, 'batch': DRAWN, 'bf16': SELECTED, 'padding': SELECTED},
    ),
    'FGD': (
        'retinanet',
        'retinanet',
        dict(type='FGD'),
        {
            'bf16': 'the exponential of its attention amplifies the rounding of the features, to 1.3e-2 here',
            'padding': 'attention and background are of the whole map',
        },
    ),
    'MGD': (
        'retinanet',
        'retinanet',
        dict(type='MGD', layer='neck'),
        {'zero': 'the generator is not the identity', 'batch': 'masks are random', 'padding': 'the whole map counts'},
    ),
    'PKD': (
        'retinanet',
        'retinanet',
        dict(type='PKD', layer='neck'),
        {'batch': UNBIASED, 'padding': 'statistics are of the whole map'},
    ),
    'PKD across families': (
        'retinanet',
        'faster_rcnn',
        dict(type='PKD', layer='neck'),
        {'zero': OTHER, 'batch': UNBIASED, 'padding': 'statistics are of the whole map'},
    ),
    'SSIM': ('retinanet', 'retinanet', dict(type='SSIM', layer='neck'), {'padding': WHOLE}),
    'FKD': (
        'retinanet',
        'retinanet',
        dict(type='FKD', layer='neck', feature_weight=1.0, channel_weight=1.0, spatial_weight=1.0, relation_weight=1.0),
        {'zero': TRAINED, 'batch': DISTANCE, 'padding': WHOLE},
    ),
    'MasKD': (
        'retinanet',
        'retinanet',
        dict(type='MasKD', token_steps=0),
        {'zero': PHASE, 'padding': WHOLE},
    ),
    'MasKD, its tokens': (
        'retinanet',
        'retinanet',
        dict(type='MasKD'),
        {
            'zero': PHASE,
            'batch': TOKENS,
            'bf16': TOKENS,
            'padding': TOKENS,
        },
    ),
    'FreeKD': (
        'retinanet',
        'retinanet',
        dict(type='FreeKD', token_steps=0),
        {'zero': PHASE, 'padding': WHOLE},
    ),
    'ICD': (
        'retinanet',
        'retinanet',
        dict(type='ICD'),
        {'zero': TRAINED, 'batch': FAKES, 'padding': FAKES},
    ),
    'CanKD': (
        'retinanet',
        'retinanet',
        dict(type='CanKD', layer='neck'),
        {'padding': 'the whole map counts'},
    ),
    'BCKD GFL': ('gfl', 'gfl', dict(type='BCKD'), {}),
    'BCKD FCOS': ('fcos', 'fcos', dict(type='BCKD'), {}),
    'CrossKD GFL': (
        'gfl',
        'gfl',
        dict(type='CrossKD', position=1, bbox_weight=4.0),
        {'batch': UNBIASED, 'padding': WHOLE},
    ),
    'CrossKD RetinaNet': (
        'retinanet',
        'retinanet',
        dict(type='CrossKD', position=1),
        {'batch': UNBIASED, 'padding': WHOLE},
    ),
    'CrossKD across families': (
        'gfl',
        'atss',
        dict(type='CrossKD', position=1),
        {'zero': OTHER, 'batch': UNBIASED, 'padding': WHOLE},
    ),
    'PGD GFL': (
        'gfl',
        'gfl',
        dict(type='PGD'),
        {'bf16': SELECTED, 'padding': 'attention is of the whole map'},
    ),
    'PGD RetinaNet': (
        'retinanet',
        'retinanet',
        dict(type='PGD'),
        {'bf16': SELECTED, 'padding': 'attention is of the whole map'},
    ),
    'LD': ('gfl', 'gfl', dict(type='LD'), {}),
    'ERD': ('gfl', 'gfl', dict(type='ERD', alpha=0.5, tau=1.0, bbox_weight=100.0), {'bf16': SELECTED}),
    'FGFI': (
        'retinanet',
        'retinanet',
        dict(type='FGFI', head='bbox_head', loss_weight=0.01),
        {'zero': 'its adapter, always there, is not the identity'},
    ),
    'DeFeat RetinaNet': (
        'retinanet',
        'retinanet',
        dict(type='DeFeat', cls_object_weight=0, cls_background_weight=0),
        {'zero': 'its adapters, always there, are not the identity', 'padding': 'the background is of the whole map'},
    ),
    'DeFeat Faster R-CNN': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='DeFeat'),
        {
            'zero': 'its adapters, always there, are not the identity',
            'batch': SAMPLED,
            'bf16': NO_NMS,
            'padding': SAMPLED,
        },
    ),
    'FRS': (
        'retinanet',
        'retinanet',
        dict(type='FRS', feature_weight=0.005, cls_weight=0.02),
        {'zero': 'its adapters, always there, are not the identity', 'padding': 'the mask is of the whole map'},
    ),
    'FitNet': ('retinanet', 'retinanet', dict(type='FitNet', layer='neck'), {'padding': WHOLE}),
    'DKD': (
        'faster_rcnn',
        'faster_rcnn',
        dict(type='DKD', tckd_weight=100.0, nckd_weight=100.0),
        {'batch': SAMPLED, 'bf16': NO_NMS, 'padding': SAMPLED},
    ),
    'RKD of cells': (
        'retinanet',
        'retinanet',
        dict(type='RKD', layer='neck', samples=16),
        {'batch': FEWER, 'bf16': FLAT},
    ),
    'SP': ('retinanet', 'retinanet', dict(type='SP', layer='neck', samples=16), {'batch': FEWER}),
    'SP of images': (
        'retinanet',
        'retinanet',
        dict(type='SP', layer='neck', between='images'),
        {'batch': 'each image is more like its copies than like others', 'bf16': FLAT, 'padding': WHOLE},
    ),
    'SP of pixels': (
        'retinanet',
        'retinanet',
        dict(type='SP', layer='neck', between='pixels'),
        {'batch': 'pixels are random', 'padding': 'resized maps mix the last positions with the padding'},
    ),
    'IRG': ('retinanet', 'retinanet', dict(type='IRG', layer='neck', samples=16), {'batch': FEWER, 'bf16': FLAT}),
    'FSP': (
        'retinanet',
        'retinanet',
        dict(type='FSP', layer='neck'),
        {'bf16': 'products of features round twice', 'padding': WHOLE},
    ),
    'ReviewKD': (
        'retinanet',
        'retinanet',
        dict(type='ReviewKD', layer='neck', channels=16),
        {'zero': TRAINED, 'bf16': 'of a level of 1x1 positions its batch norm leaves the signs', 'padding': WHOLE},
    ),
    'AFD': ('retinanet', 'retinanet', dict(type='AFD', layer='neck', channels=16), {'zero': TRAINED, 'padding': WHOLE}),
    'OFD': (
        'retinanet',
        'retinanet',
        dict(type='OFD', layer='neck', loss_weight=1e-3, adapter='auto'),
        {'padding': WHOLE},
    ),
    'MatchingGuided': (
        'retinanet',
        'retinanet',
        dict(type='MatchingGuided', layer='neck', loss_weight=1e-3),
        {'zero': TRAINED, 'bf16': 'rounding decides which channels are alike', 'padding': WHOLE},
    ),
    'CRD': (
        'retinanet',
        'retinanet',
        dict(type='CRD', layer='neck', channels=16, memory=64, samples=16),
        {'zero': TRAINED, 'batch': FEWER, 'bf16': REMEMBERS, 'padding': REMEMBERS},
    ),
    'CRCD': (
        'retinanet',
        'retinanet',
        dict(type='CRCD', layer='neck', channels=16, memory=64, samples=16),
        {'zero': TRAINED, 'batch': FEWER, 'bf16': REMEMBERS, 'padding': REMEMBERS},
    ),
}


def holds(name):
    """The methods for which a property holds, as parameters of a test."""
    return pytest.mark.parametrize('method', [method for method, row in METHODS.items() if name not in row[3]])


def pair(method, tmp_path, channels=24, same=False):
    """A student and its teacher: of other weights and channels, or the same."""
    family, teacher_family, spec, _ = METHODS[method]
    teacher = getattr(detectors, teacher_family)(16 if same else channels)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    student = models.build(getattr(detectors, family)(), seed=0)
    model = distill(student, dict(config=teacher, checkpoint=checkpoint), dict(it=spec))
    if same:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=False)
    model.sources['teacher'].load()
    return model.train()


def batch_of(model, images=2, objects=4, copies=1):
    data = random_batch(model, (images, 3, 96, 128), objects)
    data = {key: value * copies for key, value in data.items()}
    return model.data_preprocessor(data, True)


@pytest.mark.parametrize('method', METHODS)
def test_each_loss_has_a_weight_of_its_name(method, tmp_path):
    """``loss_cls`` has ``cls_weight``; and without any weight nothing is left."""
    model = pair(method, tmp_path)
    distiller = model.distillers['it']
    names = {key.removeprefix('it.') for key in losses(model, batch_of(model))}
    weights = {'loss_weight' if name == 'loss' else f'{name.removeprefix("loss_")}_weight' for name in names}
    assert all(isinstance(getattr(distiller, weight), Weight) for weight in weights)
    for weight in weights:
        setattr(distiller, weight, Weight(0.0))
    with Taps(model, model.distillers.student_layers) as student:
        batch = batch_of(model)
        model.loss(batch['inputs'], batch['data_samples'])
    with torch.no_grad():
        teacher = model.sources['teacher'](batch['inputs'], batch['data_samples'])
    found = distiller(student, teacher, batch['data_samples'])
    assert all(value == 0 for key, value in found.items() if key.startswith('loss'))


@holds('zero')
def test_zero_for_identical_networks(method, tmp_path):
    model = pair(method, tmp_path, same=True)
    for module in model.modules():  # teachers are in eval mode
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    found = losses(model, batch_of(model))
    assert_zero(found, losses(pair(method, tmp_path), batch_of(model)))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('objects', [0, 4])
def test_finite_and_differentiable_in_every_trainable_part(method, objects, tmp_path):
    model = pair(method, tmp_path)
    found = losses(model, batch_of(model, objects=objects))
    assert_differentiable(model, found)


@holds('batch')
def test_the_same_images_twice_give_the_same_value(method, tmp_path):
    model = pair(method, tmp_path)
    once, twice = losses(model, batch_of(model)), losses(model, batch_of(model, copies=2))
    assert_close(twice, once, 1e-4, 1e-6)


@holds('bf16')
def test_bf16_autocast_changes_little(method, tmp_path):
    """The whole forward pass of both networks under autocast, 1e-2 of the value."""
    model = pair(method, tmp_path)
    batch = batch_of(model)
    exact = losses(model, batch)
    with torch.autocast('cpu', torch.bfloat16):
        rounded = losses(model, batch)
    assert_close(rounded, exact, 1e-2, 1e-4)


@holds('padding')
def test_what_is_in_the_padding_does_not_matter(method, tmp_path):
    """Features of 96x128 images in a batch padded to 160x192: noise is added where no image is, in both networks."""
    model = pair(method, tmp_path)
    data = random_batch(model, (2, 3, 96, 128), 4)
    data['inputs'].append(torch.zeros(3, 160, 192, dtype=torch.uint8))  # makes the batch as large, and is then left out
    data['data_samples'].append(random_batch(model, (1, 3, 160, 192), 1)['data_samples'][0])
    batch = model.data_preprocessor(data, True)
    samples = batch['data_samples'][:2]
    results = []
    for noise in (0.0, 1.0):
        taps = []
        for network, layers in (
            (model, model.distillers.student_layers),
            (model.sources['teacher'].model, model.distillers['it'].teacher_layers),
        ):
            with Taps(network, layers) as read, DefaultScope.overwrite_default_scope('mmdet'):
                features = network.extract_feat(batch['inputs'][:2])
                (network.bbox_head if hasattr(network, 'bbox_head') else network.rpn_head)(features)
            taps.append(Noisy(read, noise))
        found = model.distillers['it'](*taps, samples)
        results.append({key: value for key, value in found.items() if key.startswith('loss')})
    assert sum(results[0].values()) > 0
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)


class Noisy(dict):
    """Taps whose maps have noise in the cells that begin at least one cell beyond the image of 96x128."""

    def __init__(self, taps, noise):
        super().__init__()
        self.model, self.calls, self.images = taps.model, taps.calls, taps.images
        self.classes = taps.classes
        random = torch.Generator().manual_seed(0)

        def noisy(value):
            if isinstance(value, tuple):
                return tuple(noisy(each) for each in value)
            rows, columns = (torch.arange(size) for size in value.shape[2:])
            outside = (rows * 160 / len(rows) >= 96 + 160 / len(rows))[:, None] | (
                columns * 192 / len(columns) >= 128 + 192 / len(columns)
            )
            return value + noise * outside * torch.randn(value.shape, generator=random)

        for layer in taps:
            self[layer] = noisy(taps[layer])
