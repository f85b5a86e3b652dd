"""Old names of options, and where each default is from: one table of each, for the methods of segmentors and the generic ones."""

import inspect
from pathlib import Path

import pytest

from mmkd.distillers import SKD
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build

# method: options of 0.1 and what they are called now
RENAMED = {
    'AT': {'weight': 'loss_weight'},
    'CWD': {'weight': 'loss_weight'},
    'MGD': {'weight': 'loss_weight'},
    'PKD': {'weight': 'loss_weight'},
    'KD': {'weight': 'loss_weight'},
    'IFVD': {'weight': 'loss_weight'},
    'DIST': {
        'weight': 'inter_weight and intra_weight',
        'loss_weight': 'inter_weight and intra_weight',
        'beta': 'inter_weight',
        'gamma': 'intra_weight',
    },
    'CIRKD': {
        'weight': 'batch_weight',
        'pixels': 'pixel_contrast_size',
        'regions': 'region_contrast_size',
        'pixel_memory': 'pixel_memory_size',
        'region_memory': 'region_memory_size',
    },
    'DAKD': {
        'auxiliary_weight': 'auxiliary_kl_weight = auxiliary_weight * kl_weight',
        'auxiliary_teacher_layer': 'teacher_auxiliary_layer',
    },
}


@pytest.mark.parametrize(
    ('method', 'old', 'new'), [(m, *names) for m, each in RENAMED.items() for names in each.items()]
)
def test_an_old_name_is_one_line_that_has_the_new_one(method, old, new):
    with pytest.raises(ConfigError) as error:
        build(DISTILLERS, 'distillers.it', {'type': method, 'layer': 'neck', old: 1})
    assert str(error.value) == f'distillers.it: {method} calls {old!r} {new!r} now'


@pytest.mark.parametrize('method', RENAMED)
def test_new_names_exist_and_old_ones_do_not(method):
    kind = DISTILLERS.get(method)
    options = inspect.signature(kind).parameters
    assert kind.renamed == RENAMED[method]
    for old, new in kind.renamed.items():
        assert old not in options
        assert all(each in options for each in new.partition(' = ')[0].split(' and '))


PAPER, CODE, CIRKD_CODE, MMRAZOR = "its paper's", "its authors' code", "CIRKD's code", "MMRazor's"
OURS, HEAD, NAME = 'none is published', 'found by the decode head', 'as the student calls it'
EXTENT = 'bounds memory; none is published'
# method: option: (default, where it is from)
DEFAULTS = {
    'AT': {
        'form': ('mean', CODE),
        'power': (2.0, f'{PAPER} and {CODE}'),
        'loss_weight': (1000.0, f"{CODE}, for form='mean'"),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'MasKD': {
        'layer': (None, f'{CODE}: the neck, the class logits'),
        'loss_weight': (1.0, f'{CODE}, for Faster R-CNN'),
        'tokens': (6, f'{CODE} for detectors; 8 for segmentors'),
        'token_steps': (2000, f'{CODE} for detectors; 10000 for segmentors'),
        'both_begin': (7000, f'{CODE} for RetinaNet; 5000 to 8500 for others'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', OURS),
    },
    'CanKD': {
        'loss_weight': (10.0, f'{CODE}; {PAPER} is 5, without the half'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', CODE),
        'match': ('stride', OURS),
    },
    'FKD': {
        'feature_weight': (7e-5, MMRAZOR),
        'channel_weight': (4e-3, MMRAZOR),
        'spatial_weight': (4e-3, MMRAZOR),
        'relation_weight': (7e-5, MMRAZOR),
        'tau': (0.5, MMRAZOR),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'SSIM': {
        'loss_weight': (4.0, f'{PAPER}, as quoted in reading notes: 2 or 4; for which models is not known'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', f'{PAPER} has none and a 1x1 convolution, as quoted in reading notes'),
        'match': ('stride', OURS),
    },
    'CWD': {
        'tau': (1.0, MMRAZOR),
        'loss_weight': (10.0, f'{MMRAZOR}, for the neck of a detector'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', OURS),
        'match': ('stride', OURS),
        'standardize': (False, f'{PAPER}; True in the recipes of RTMDet and DAMO-YOLO'),
    },
    'MGD': {
        'mask_ratio': (0.65, f'{PAPER}, one-stage detectors'),
        'loss_weight': (2e-5, f'{PAPER}, one-stage detectors; {CODE} for segmentation'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', CODE),
        'match': ('stride', OURS),
    },
    'PKD': {
        'loss_weight': (10.0, f'{MMRAZOR}, one-stage teachers'),
        'eps': (1e-6, MMRAZOR),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', 'only where channels differ, for which none is published'),
        'match': ('stride', OURS),
    },
    'KD': {
        'layer': (None, HEAD),
        'tau': (1.0, CIRKD_CODE),
        'loss_weight': (1.0, CIRKD_CODE),
        'reduction': ('pixel_mean', CIRKD_CODE),
        'label_size': (False, CIRKD_CODE),
        'use_labels': (True, OURS),
        'teacher_layer': (None, NAME),
    },
    'FitNet': {
        'loss_weight': (10.0, CIRKD_CODE),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', 'only where channels differ; its paper has one always'),
        'match': ('stride', OURS),
    },
    'DKD': {
        'layer': (None, HEAD),
        'tckd_weight': (1.0, CODE),
        'nckd_weight': (0.25, f'{CODE} for detection'),
        'tau': (1.0, f'{CODE} for detection'),
        'teacher_layer': (None, NAME),
    },
    'RKD': {
        'between': ('cells', f'{OURS}; {PAPER} are images'),
        'samples': (64, EXTENT),
        'distance_weight': (25.0, f"{MMRAZOR} and mdistiller's"),
        'angle_weight': (50.0, f"{MMRAZOR} and mdistiller's"),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'Affinity': {
        'loss_weight': (1.0, "torchdistill's"),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', OURS),
        'match': ('stride', OURS),
    },
    'SP': {
        'between': ('cells', f'{OURS}; {PAPER} are images'),
        'samples': (64, EXTENT),
        'loss_weight': (3000.0, "RepDistiller's"),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'IRG': {
        'between': ('cells', f'{OURS}; {PAPER} are images'),
        'samples': (64, EXTENT),
        'edge_weight': (5.0, "a re-implementation's"),
        'transformation_weight': (5.0, "a re-implementation's"),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'FSP': {
        'loss_weight': (50.0, "RepDistiller's"),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', 'only where channels differ, for which none is published'),
        'match': ('stride', OURS),
    },
    'ReviewKD': {
        'channels': (256, f'{CODE} for pyramids'),
        'loss_weight': (1.0, f'{CODE}, R101 to R50'),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'AFD': {
        'channels': (128, CODE),
        'loss_weight': (200.0, CODE),
        'teacher_layer': (None, NAME),
    },
    'OFD': {
        'loss_weight': (1e-5, f'{CODE}, for segmentation and detection'),
        'teacher_layer': (None, NAME),
        'adapter': (dict(type='ConvAdapter', bias=False, norm=True), CODE),
        'match': ('stride', OURS),
    },
    'MatchingGuided': {
        'reduction': ('absmax', PAPER),
        'interval': (5000, f'{CODE}, for a detector'),
        'track': (1000, f'{CODE}, for a detector'),
        'loss_weight': (2.5e-8, f'{CODE}, for a detector: 2e-7, of a sum over 2 of 16 images that is divided by 16'),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'CRD': {
        'channels': (128, CODE),
        'tau': (0.07, CODE),
        'memory': (4096, EXTENT),
        'samples': (64, EXTENT),
        'loss_weight': (0.8, CODE),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'CRCD': {
        'channels': (128, CODE),
        'tau': (0.05, CODE),
        'memory': (500, f'{CODE}: the number of negatives'),
        'samples': (64, f'{CODE}: the batch'),
        'loss_weight': (1.0, CODE),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'TOFD': {
        'layer': (None, HEAD),
        'feature_weight': (0.5, f'{CODE}: 0.05, for the root of 128 samples'),
        'orthogonal_weight': (0.03, CODE),
        'teacher_layer': (None, NAME),
    },
    'SKD': {
        'layer': (None, HEAD),
        'feature_layer': (None, HEAD),
        'pixel_weight': (10.0, PAPER),
        'pair_weight': (0.5, f'the script of {CODE}'),
        'holistic_weight': (0.001, "TorchDistiller's, the first author's later code"),
        'critic_weight': (0.1, f'{CODE} and TorchDistiller'),
        'penalty_weight': (10.0, f'{CODE}, and of WGAN-GP'),
        'tau': (1.0, CODE),
        'pixel_reduction': ('pixel_mean', f'{PAPER}, from memory'),
        'use_labels': (True, OURS),
        'kernel': (None, CODE),
        'scale': (None, f'0.5 where neither is given: {CODE}'),
        'max_nodes': (4096, EXTENT),
        'mode': ('wgan-gp', CODE),
        'critic_norm': ('batch', CODE),
        'spectral_norm': (True, CODE),
        'condition_on_image': (False, f'{CODE}; the paper has it'),
        'teacher_layer': (None, NAME),
        'teacher_feature_layer': (None, NAME),
    },
    'IFVD': {
        'layer': (None, HEAD),
        'loss_weight': (20.0, CIRKD_CODE),
        'count_ignored': (False, f'{OURS}; {CODE} counts them'),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'CIRKD': {
        'layer': (None, HEAD),
        'batch_weight': (1.0, CODE),
        'pixel_weight': (0.1, CODE),
        'region_weight': (0.1, CODE),
        'tau': (0.1, CODE),
        'pixel_contrast_size': (4096, CODE),
        'region_contrast_size': (1024, CODE),
        'pixel_memory_size': (2000, f'the SegFormer script of {CODE}; 20000 elsewhere'),
        'region_memory_size': (2000, CODE),
        'pixels_per_image': (16, CODE),
        'max_positions': (8192, EXTENT),
        'teacher_layer': (None, NAME),
    },
    'Trust': {
        'layer': (None, HEAD),
        'tau': (1.0, 'that of KD'),
        'loss_weight': (1.0, 'that of KD'),
        'reduction': ('pixel_mean', 'that of KD'),
        'label_size': (False, 'that of KD'),
        'use_labels': (True, 'that of KD'),
        'teacher_layer': (None, NAME),
    },
    'NST': {
        'loss_weight': (50.0, "RepDistiller's"),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'CFL': {
        'mmd_weight': (1.0, CODE),
        'reconstruction_weight': (1.0, CODE),
        'common_channels': (None, CODE),
        'positions': (256, EXTENT),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'WSLD': {
        'layer': (None, HEAD),
        'tau': (2.0, MMRAZOR),
        'loss_weight': (2.5, MMRAZOR),
        'reduction': ('pixel_mean', 'that of KD'),
        'label_size': (False, 'that of KD'),
        'teacher_layer': (None, NAME),
    },
    'DIST': {
        'layer': (None, HEAD),
        'inter_weight': (1.0, f'{CODE} for segmentation'),
        'intra_weight': (1.0, f'{CODE} for segmentation'),
        'tau': (1.0, f'{CODE} for segmentation'),
        'teacher_layer': (None, NAME),
        'use_labels': (True, OURS),
    },
    'ONE': {'branches': (3, CODE), 'tau': (3.0, CODE), 'loss_weight': (1.0, CODE)},
    'OKDDip': {'branches': (4, CODE), 'tau': (3.0, CODE), 'loss_weight': (1.0, CODE)},
    'AfDCD': {
        'feature_weight': (2e-6, f'{CODE}, Cityscapes'),
        'contrast_weight': (0.005, f'{CODE}, Cityscapes'),
        'mask_ratio': (0.75, CODE),
        'tau': (0.07, CODE),
        'groups': (16, CODE),
        'pool': (4, CODE),
        'patch': (4, CODE),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', CODE),
        'match': ('stride', OURS),
    },
    'RMRKD': {
        'loss_weight': (6.4, f'{CODE} has 0.1 for a sum over the 64 columns of a map'),
        'tau': (0.1, f'the configs of {CODE}'),
        'teacher_layer': (None, NAME),
        'adapter': ('auto', CODE),
        'match': ('stride', OURS),
    },
    'BPKD': {
        'layer': (None, HEAD),
        'edge_weight': (1.0, 'that of KD; the published one is not known'),
        'body_weight': (5.0, "that of CWD on logits, MMRazor's; the published one is not known"),
        'width': (7, 'from memory, unverified'),
        'tau': (1.0, 'that of both; the published one is not known'),
        'teacher_layer': (None, NAME),
    },
    'AICSD': {
        'layer': (None, HEAD),
        'loss_weight': (10.0, f'{OURS}; its gradient is then a few times that of the task, for an untrained student'),
        'tau': (1.0, CODE),
        'teacher_layer': (None, NAME),
    },
    'DSD': {
        'layer': (None, HEAD),
        'feature_layer': (None, HEAD),
        'auxiliary_layer': (None, HEAD),
        'pixel_weight': (1000.0, CIRKD_CODE),
        'category_weight': (10.0, CIRKD_CODE),
        'tau': (4.0, CIRKD_CODE),
        'teacher_layer': (None, NAME),
        'teacher_feature_layer': (None, NAME),
        'teacher_auxiliary_layer': (None, NAME),
    },
    'AttnFD': {
        'loss_weight': (0.33, f'{CODE} has 2 for a norm over a batch of 6'),
        'teacher_layer': (None, NAME),
        'match': ('stride', OURS),
    },
    'TransKD': {
        'layer': ('backbone', CODE),
        'embedding_layer': (tuple(f'backbone.layers.{stage}.0' for stage in range(4)), f"{CODE}; mmseg's names"),
        'channels': (64, CODE),
        'feature_weight': (1.0, CODE),
        'embedding_weight': ((0.1, 0.1, 0.5, 1.0), CODE),
        'teacher_layer': (None, NAME),
        'teacher_embedding_layer': (None, NAME),
    },
    'DAKD': {
        'layer': (None, HEAD),
        'auxiliary_layer': (None, HEAD),
        'kl_weight': (0.1, CODE),
        'auxiliary_kl_weight': (0.01, f'{CODE}, 0.1 of 0.1'),
        'mse_weight': (0.01, CODE),
        'pseudo_weight': (1.0, CODE),
        'adversarial_weight': (1e-3, CODE),
        'auxiliary_adversarial_weight': (2e-4, CODE),
        'target_weight': (1.0, CODE),
        'reduction': ('element_mean', CODE),
        'threshold': (None, CODE),
        'label_size': (False, f'{OURS}; {CODE} compares at the size of images'),
        'upsample': (True, CODE),
        'critic_channels': (64, CODE),
        'teacher_layer': (None, NAME),
        'teacher_auxiliary_layer': (None, NAME),
    },
}


@pytest.mark.parametrize('method', DEFAULTS)
def test_defaults(method):
    """Each option has a row here, which says where its default is from."""
    options = inspect.signature(DISTILLERS.get(method)).parameters
    found = {name: each.default for name, each in options.items() if each.default is not each.empty}
    assert found == {name: default for name, (default, _) in DEFAULTS[method].items()}


def test_skds_nodes_without_an_option():
    assert (SKD().kernel, SKD().scale) == (None, 0.5)


def test_every_method_has_its_rows():
    """Those of the folders of segmentation and generic methods."""
    own = {
        name
        for name, kind in DISTILLERS.module_dict.items()
        if kind.__module__.startswith(('mmkd.distillers.segmentation', 'mmkd.distillers.generic'))
    }
    assert own == set(DEFAULTS)


@pytest.mark.parametrize('method', DEFAULTS)
def test_the_page_of_a_method_names_its_options(method):
    """And the class names the page."""
    page = f'docs/methods/{method.lower()}.md'
    kind = DISTILLERS.get(method)
    assert page in inspect.getdoc(kind)
    text = (Path(__file__).parents[3] / page).read_text()
    assert [name for name in inspect.signature(kind).parameters if f'`{name}`' not in text] == []
