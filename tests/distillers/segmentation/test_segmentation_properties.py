"""What holds for which method for segmentation: one table, see METHODS."""

import pytest
import torch

from mmkd.distill import distill
from mmkd.hosts.running import run
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.properties import assert_close, assert_differentiable, assert_zero, losses

PHASE = 'tokens learn first, then features are compared: one of the two is 0; test_maskd has the other'
ALL_PIXELS = 'its features or logits are compared at every position, as published'
OTHER = 'other networks, or parts that are trained'
PROJECTED = {f'it.loss_{key}': 'the projection is trained' for key in ('pixel', 'region')}
NORMALIZED = dict.fromkeys(PROJECTED, "the projection's batch norm is over all positions")
ADVERSARIAL = 'the game with a critic'
GAME = {f'it.loss_{key}': ADVERSARIAL for key in ('holistic', 'critic')}
DOMAINS = {f'it.loss_{key}': ADVERSARIAL for key in ('adversarial', 'auxiliary_adversarial', 'critic')}
DOMAINS |= {'it.loss_pseudo': 'a cross-entropy with the class that the teacher finds most probable'}
NEARLY_CONSTANT = (
    'the correlation of a class that hardly varies is below 1, as the authors have it; test_dist has larger logits'
)
CRITIC = 'the critic normalizes by the batch, and its penalty is of random mixtures'
SAMPLES = {'batch': 'of more images there are fewer samples each', 'ignored': ALL_PIXELS}
# method: (student, teacher, distiller, properties that do not hold and why, perhaps for some losses alone)
METHODS = {
    'KD': ('pspnet', 'pspnet', dict(type='KD'), {}),
    'KD at the size of labels': ('pspnet', 'pspnet', dict(type='KD', label_size=True, tau=2.0), {}),
    'WSLD': ('pspnet', 'pspnet', dict(type='WSLD', label_size=True), {}),
    'Trust': ('pspnet', 'pspnet', dict(type='Trust'), {}),
    'KD across families': ('pspnet', 'deeplabv3', dict(type='KD'), {'zero': OTHER}),
    'CWD': (
        'pspnet',
        'pspnet',
        dict(type='CWD', layer='decode_head.conv_seg', tau=4.0, loss_weight=3.0),
        {'ignored': ALL_PIXELS},
    ),
    'CWD on features': (
        'pspnet',
        'pspnet',
        dict(
            type='CWD',
            layer='decode_head.bottleneck',
            tau=4.0,
            loss_weight=50.0,
            adapter=dict(type='ConvAdapter', bias=False, norm=True, relu=True),
        ),
        {'zero': OTHER, 'ignored': ALL_PIXELS},
    ),
    'SKD without critic': ('pspnet', 'pspnet', dict(type='SKD', holistic_weight=0.0), {'ignored': ALL_PIXELS}),
    'SKD': (
        'pspnet',
        'pspnet',
        dict(type='SKD', holistic_weight=1.0),
        {
            'zero': {'it.loss_holistic': ADVERSARIAL, 'it.loss_critic': ADVERSARIAL},
            'batch': CRITIC,
            'bf16': CRITIC,
            'ignored': ALL_PIXELS,
        },
    ),
    'SKD of SegFormer': (
        'segformer',
        'pspnet',
        dict(
            type='SKD',
            holistic_weight=0.0,
            feature_layer='decode_head.fusion_conv',
            teacher_feature_layer='decode_head.bottleneck',
        ),
        {'zero': OTHER, 'ignored': ALL_PIXELS},
    ),
    'IFVD': ('pspnet', 'pspnet', dict(type='IFVD'), {}),
    'CIRKD': (
        'pspnet',
        'pspnet',
        dict(type='CIRKD'),
        {'zero': PROJECTED, 'ignored': NORMALIZED},
    ),
    'DIST': ('deeplabv3', 'deeplabv3', dict(type='DIST'), {'zero': {'it.loss_intra': NEARLY_CONSTANT}}),
    'MGD': (
        'pspnet',
        'pspnet',
        dict(type='MGD', layer='backbone.layer4'),
        {'zero': 'the generator is not the identity', 'batch': 'masks are random', 'ignored': ALL_PIXELS},
    ),
    'SSIM': ('pspnet', 'pspnet', dict(type='SSIM', layer='backbone.layer4'), {'ignored': ALL_PIXELS}),
    'FKD': (
        'pspnet',
        'pspnet',
        dict(type='FKD', layer='backbone.layer4'),
        {
            'zero': 'parts that are trained are not the identity',
            'batch': 'a distance over the batch grows with the root of the number of images',
            'ignored': ALL_PIXELS,
        },
    ),
    'MasKD': ('pspnet', 'pspnet', dict(type='MasKD', token_steps=0), {'zero': PHASE, 'ignored': ALL_PIXELS}),
    'MasKD, its tokens': (
        'pspnet',
        'pspnet',
        dict(type='MasKD'),
        {'zero': PHASE, 'ignored': ALL_PIXELS},
    ),
    'CanKD': (
        'pspnet',
        'pspnet',
        dict(type='CanKD', layer='backbone.layer4'),
        {'ignored': ALL_PIXELS},
    ),
    'AT': (
        'pspnet',
        'pspnet',
        dict(type='AT', layer=['backbone.layer3', 'backbone.layer4'], loss_weight=1e4),
        {'ignored': ALL_PIXELS},
    ),
    'NST': (
        'pspnet',
        'pspnet',
        dict(type='NST', layer='backbone.layer4'),
        {'ignored': ALL_PIXELS},
    ),
    'Affinity': (
        'pspnet',
        'pspnet',
        dict(type='Affinity', layer='decode_head.bottleneck', loss_weight=100.0),
        {'ignored': ALL_PIXELS},
    ),
    'FitNet': ('pspnet', 'pspnet', dict(type='FitNet', layer='decode_head.bottleneck'), {'ignored': ALL_PIXELS}),
    'DKD': ('pspnet', 'pspnet', dict(type='DKD', tckd_weight=100.0, nckd_weight=100.0), {}),
    'RKD': ('pspnet', 'pspnet', dict(type='RKD', layer='decode_head.bottleneck', samples=32), SAMPLES),
    'SP': ('pspnet', 'pspnet', dict(type='SP', layer='decode_head.bottleneck', between='pixels'), SAMPLES),
    'IRG': ('pspnet', 'pspnet', dict(type='IRG', layer=['backbone.layer3', 'backbone.layer4']), SAMPLES),
    'FSP': (
        'pspnet',
        'pspnet',
        dict(type='FSP', layer=['backbone.layer1', 'backbone.layer2']),
        {'ignored': ALL_PIXELS},
    ),
    'ReviewKD': (
        'pspnet',
        'pspnet',
        dict(type='ReviewKD', layer=[f'backbone.layer{i}' for i in (1, 2, 3, 4)], channels=16),
        {'zero': OTHER, 'ignored': ALL_PIXELS},
    ),
    'AFD': (
        'pspnet',
        'deeplabv3',
        dict(type='AFD', layer=[f'backbone.layer{i}' for i in (2, 3, 4)], teacher_layer='backbone.layer4', channels=16),
        {'zero': OTHER, 'ignored': ALL_PIXELS},
    ),
    'OFD': (
        'pspnet',
        'pspnet',
        dict(type='OFD', layer=['backbone.layer4', 'decode_head.bottleneck'], loss_weight=1e-3, adapter='auto'),
        {'ignored': ALL_PIXELS},
    ),
    'OFD with adapters': (
        'pspnet',
        'deeplabv3',
        dict(type='OFD', layer=['backbone.layer4', 'decode_head.bottleneck'], loss_weight=1e-3),
        {'zero': OTHER, 'ignored': ALL_PIXELS},
    ),
    'MatchingGuided': (
        'pspnet',
        'deeplabv3',
        dict(type='MatchingGuided', layer=['backbone.layer3', 'decode_head.bottleneck'], loss_weight=1e-3),
        {
            'zero': 'the batch norm, always there',
            'bf16': 'rounding decides which channels are alike',
            'ignored': ALL_PIXELS,
        },
    ),
    'CRD': (
        'pspnet',
        'pspnet',
        dict(type='CRD', layer='decode_head.bottleneck', channels=16, memory=64, samples=32),
        {'zero': OTHER, 'batch': 'of more images there are fewer cells each', 'ignored': ALL_PIXELS},
    ),
    'CRCD': (
        'pspnet',
        'pspnet',
        dict(type='CRCD', layer='decode_head.bottleneck', channels=16, memory=64, samples=32),
        {'zero': OTHER, 'batch': 'of more images there are fewer cells each', 'ignored': ALL_PIXELS},
    ),
    'AfDCD': (
        'pspnet',
        'pspnet',
        dict(type='AfDCD', layer='backbone.layer4', groups=8),
        {
            'zero': 'the generator is not the identity, and other groups are never infinitely far',
            'batch': 'masks are random',
            'ignored': ALL_PIXELS,
        },
    ),
    'RMRKD': ('pspnet', 'pspnet', dict(type='RMRKD', layer='backbone.layer4'), {}),
    'BPKD': ('pspnet', 'pspnet', dict(type='BPKD'), {}),
    'AICSD': ('pspnet', 'pspnet', dict(type='AICSD'), {'ignored': ALL_PIXELS}),
    'DSD': ('pspnet', 'pspnet', dict(type='DSD', category_weight=1e4), {'ignored': ALL_PIXELS}),
    'AttnFD': (
        'pspnet',
        'pspnet',
        dict(type='AttnFD', layer=['backbone.layer4', 'decode_head.bottleneck']),
        {'zero': 'attention is trained, and so are adapters', 'ignored': ALL_PIXELS},
    ),
    'TOFD': (
        'pspnet',
        'pspnet',
        dict(type='TOFD'),
        {
            'zero': 'the adapter, always there',
            'ignored': dict.fromkeys(('it.loss_feature',), ALL_PIXELS),
        },
    ),
    'TransKD': (
        'segformer',
        'segformer',
        dict(type='TransKD', channels=16),
        {'zero': 'fusions and projections are trained', 'ignored': ALL_PIXELS},
    ),
    'DAKD': (
        'deeplabv3',
        'deeplabv3',
        dict(type='DAKD', adversarial_weight=1.0, auxiliary_adversarial_weight=1.0),
        {
            'zero': {
                f'it.loss_{key}': ADVERSARIAL for key in ('pseudo', 'adversarial', 'auxiliary_adversarial', 'critic')
            },
            'ignored': 'the critics see whole maps; its own test covers the rest',
        },
    ),
}


def holds(name):
    """The methods for which a property holds, for some of their losses at least, as parameters of a test."""
    found = [method for method, row in METHODS.items() if not isinstance(row[3].get(name), str)]
    return pytest.mark.parametrize('method', found)


def pair(method, tmp_path, same=False):
    """A student and its teacher: of other weights and channels, or the same. Dropout is off in both."""
    family, teacher_family, spec, _ = METHODS[method]
    teacher = getattr(segmentors, teacher_family)(16 if same else 24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    torch.manual_seed(0)
    model = distill(student, dict(config=teacher, checkpoint=checkpoint), dict(it=spec))
    if same:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=False)
    model.sources['teacher'].load()
    model.train()
    for module in model.modules():  # teachers are in eval mode; and what is in one image does not change another's
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()
        elif isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.0
    return model


def batch_of(model, images=2, objects=4, copies=1):
    data = random_batch(model, (images, 3, 64, 128), objects)
    data = {key: value * copies for key, value in data.items()}
    return model.data_preprocessor(data, True)


def losses_of(model, batch):
    """Those of the second step, which reads what the first has left in a memory."""
    losses(model, batch)
    return losses(model, batch)


@holds('zero')
def test_zero_for_identical_networks(method, tmp_path):
    """In float64: what rounding leaves of large weights differs from processor to processor."""
    found = []
    for same in (True, False):
        model = pair(method, tmp_path, same).double()
        batch = batch_of(model)
        found.append(losses_of(model, {**batch, 'inputs': batch['inputs'].double()}))
    assert_zero(*found, METHODS[method][3].get('zero', {}))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('images', 'objects'), [(2, 4), (2, 0), (1, 4)])
def test_finite_and_differentiable_in_every_trainable_part(method, images, objects, tmp_path):
    """Also without a single label, and for a batch of one image."""
    if method == 'DAKD' and images == 1:
        images = 2  # an image of each domain
    model = pair(method, tmp_path)
    assert_differentiable(model, losses_of(model, batch_of(model, images, objects)))


@pytest.mark.slow
@holds('batch')
def test_the_same_images_twice_give_the_same_value(method, tmp_path):
    model = pair(method, tmp_path)
    once, twice = (losses(pair(method, tmp_path), batch_of(model, copies=copies)) for copies in (1, 2))
    assert_close(twice, once, 1e-4, 1e-6)


@pytest.mark.slow
@holds('bf16')
def test_bf16_autocast_changes_little(method, tmp_path):
    """The whole forward pass of both networks under autocast, 2e-2 of the value."""
    model = pair(method, tmp_path)
    batch = batch_of(model)
    exact = losses_of(model, batch)
    model = pair(method, tmp_path)
    with torch.autocast('cpu', torch.bfloat16):
        rounded = losses_of(model, batch)
    assert_close(rounded, exact, 2e-2, 1e-4)


@holds('ignored')
def test_what_the_networks_see_at_ignored_pixels_does_not_matter(method, tmp_path):
    """Noise is added to the tapped maps of both where every pixel around is ignored."""
    results = []
    for noise in (0.0, 1.0):
        model = pair(method, tmp_path)
        batch = batch_of(model, objects=2)
        taps = []
        for network, layers in (
            (model, model.distillers.student_layers),
            (model.sources['teacher'].model, model.sources['teacher'].layers),
        ):
            with Taps(network, layers) as read:
                run(network, layers, batch['inputs'], batch['data_samples'])
            taps.append(Noisy(read, noise, batch['data_samples']))
        for _ in range(2):
            torch.manual_seed(0)
            found = model.distillers['it'](*taps, batch['data_samples'])
        results.append({key: value for key, value in found.items() if key.startswith('loss')})
    assert sum(results[0].values()) > 0
    for key in results[0].keys() - {key.removeprefix('it.') for key in METHODS[method][3].get('ignored', {})}:
        torch.testing.assert_close(results[1][key], results[0][key])


class Noisy(dict):
    """Taps whose maps have noise at the positions that lie further than one position from any labelled pixel."""

    def __init__(self, taps, noise, samples):
        super().__init__()
        self.model, self.calls, self.images = taps.model, taps.calls, taps.images
        self.classes, self.scale = taps.classes, taps.scale
        labelled = torch.cat([sample.gt_sem_seg.data for sample in samples])[:, None] != 255
        random = torch.Generator().manual_seed(0)
        for layer in taps:
            levels = []
            for value in taps[layer]:
                near = torch.nn.functional.adaptive_max_pool2d(labelled.float(), value.shape[2:])
                near = torch.nn.functional.max_pool2d(near, 3, 1, 1)
                assert near.mean() < 0.95
                levels.append(value + noise * (1 - near) * torch.randn(value.shape, generator=random))
            self[layer] = tuple(levels)
