import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import ModulatedDeformConv2dPack
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from torch import nn

from mmkd.errors import ConfigError
from mmkd.fold import accelerate, fold_batch_norm
from mmkd.hosts.detection.rois import RoIHead
from mmkd.hosts.running import run
from mmkd.taps import Taps, tensors
from mmkd.testing import detectors, models

SIZE = (16, 24)


class Tiny(nn.Module):
    """A model whose ``neck`` puts out what ``compute`` returns."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        self.data_preprocessor = nn.Identity()
        self.neck = nn.Identity()
        for name, part in parts.items():
            self.add_module(name, part)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        self.eval()

    def extract_feat(self, x):
        return self.neck(self.compute(x))

    def forward(self, inputs, data_samples, mode):
        return self.extract_feat(inputs)


def conv(**options):
    return nn.Conv2d(3, 3, 3, padding=1, **options)


def neck(model, images, layer='neck'):
    with torch.no_grad(), Taps(model, [layer]) as taps:
        model.extract_feat(images)
    return taps[layer]


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE)


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- folding


class Chain(Tiny):
    def __init__(self):
        super().__init__(conv1=conv(bias=False), norm1=nn.BatchNorm2d(3), conv2=conv(), norm2=nn.BatchNorm2d(3))

    def compute(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


class Odd(Tiny):
    """norm1 follows a ReLU; conv2 is called twice; only norm3 can be folded."""

    def __init__(self):
        norms = {f'norm{index}': nn.BatchNorm2d(3) for index in (1, 2, 3)}
        super().__init__(**{f'conv{index}': conv() for index in (1, 2, 3)}, **norms)

    def compute(self, x):
        x = self.norm1(self.conv1(x).relu())
        x = self.norm2(self.conv2(x)) + self.conv2(x)
        return self.norm3(self.conv3(x))


class UsedElsewhere(Chain):
    """What conv2 puts out is also taken in by something else, before or after its batch norm."""

    def __init__(self, factor: float, before: bool):
        super().__init__()
        self.factor, self.before = factor, before

    def compute(self, x):
        x = self.conv2(self.norm1(self.conv1(x)).relu())
        other = self.factor * x if self.before else None
        normalized = self.norm2(x)
        return normalized + (other if self.before else self.factor * x)


class InPlace(Tiny):
    """A ReLU changes what the convolution put out, which stays the same tensor."""

    def __init__(self):
        super().__init__(conv=conv(), norm=nn.BatchNorm2d(3))

    def compute(self, x):
        x = self.conv(x)
        x.relu_()
        return self.norm(x)


class SharedWeight(Tiny):
    """Two convolutions have one weight, and batch norms of their own."""

    def __init__(self):
        super().__init__(conv1=conv(), conv2=conv(), norm1=nn.BatchNorm2d(3), norm2=nn.BatchNorm2d(3))
        self.conv2.weight = self.conv1.weight

    def compute(self, x):
        return self.norm1(self.conv1(x)) + self.norm2(self.conv2(x))


class SharedNorm(Tiny):
    """One batch norm follows two convolutions."""

    def __init__(self):
        super().__init__(conv1=conv(), conv2=conv(), norm=nn.BatchNorm2d(3))

    def compute(self, x):
        return self.norm(self.conv1(x)) + self.norm(self.conv2(x))


class SharedBoth(Tiny):
    """A convolution and its batch norm are called for each of several levels, as in heads: they stay."""

    def __init__(self):
        super().__init__(conv=conv(), norm=nn.BatchNorm2d(3))

    def compute(self, x):
        levels = [self.conv(x), self.conv(x[..., ::2])]
        return tuple(self.norm(level) for level in levels)


class TwoNames(Tiny):
    """The batch norm is registered twice, and called by its second name."""

    def __init__(self):
        super().__init__(conv=conv(), norm1=nn.BatchNorm2d(3))
        self.norm2 = self.norm1

    def compute(self, x):
        return self.norm2(self.conv(x))


class WeightReadElsewhere(Tiny):
    """The convolution's weight is read without calling it, which no forward pass shows beforehand."""

    def __init__(self):
        super().__init__(conv=conv(), norm=nn.BatchNorm2d(3))

    def compute(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


@pytest.mark.parametrize(
    ('model', 'folded'),
    [
        (Chain, ['norm1', 'norm2']),
        (Odd, ['norm3']),
        (lambda: UsedElsewhere(1.0, before=True), ['norm1']),
        (lambda: UsedElsewhere(1.0, before=False), ['norm1']),
        (lambda: UsedElsewhere(1e-5, before=False), ['norm1']),  # too little for a comparison to show it
        (InPlace, []),
        (SharedWeight, ['norm1', 'norm2']),
        (SharedNorm, []),
        (SharedBoth, []),
        (TwoNames, ['norm1', 'norm2']),
        (WeightReadElsewhere, []),
    ],
)
def test_batch_norms_are_folded_where_that_changes_nothing(model, folded, images):
    model = model()
    expected = neck(model, images)
    number = len({model.get_submodule(name) for name in folded})
    assert fold_batch_norm(model, ('neck',), SIZE) == number
    torch.testing.assert_close(neck(model, images), expected)
    norms = {name: each for name, each in model._modules.items() if name.startswith('norm')}
    assert [name for name, each in norms.items() if isinstance(each, nn.Identity)] == folded
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(('layer', 'folded'), [('conv2', 1), ('norm2:input', 1), ('norm2', 2), ('conv2:input', 2)])
def test_a_tapped_layer_keeps_its_own_output(layer, folded, images):
    model = Chain()
    expected = neck(model, images, layer), neck(model, images)
    assert fold_batch_norm(model, ('neck', layer), SIZE) == folded
    torch.testing.assert_close((neck(model, images, layer), neck(model, images)), expected)


def test_a_model_that_folding_would_change_stays_as_it_is(images, log):
    model = WeightReadElsewhere()
    expected = neck(model, images)
    assert fold_batch_norm(model, ('neck',), SIZE) == 0
    torch.testing.assert_close(neck(model, images), expected, rtol=0, atol=0)
    assert "folding its batch norms would change ['neck']" in log.text


@pytest.mark.slow
def test_a_full_size_teacher_equals_stock_mmdet():
    """ResNet-50 with batch-norm statistics that are not the initial ones."""
    config = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model
    config.backbone.init_cfg = None
    model = models.build(config, seed=0).eval()
    layers, images, found = ('neck', 'bbox_head'), torch.randn(1, 3, 128, 160), []
    for folded in (None, 53):
        assert folded is None or fold_batch_norm(model, layers) == folded
        with torch.no_grad(), Taps(model, layers) as taps:
            run(model, layers, images, None)
        found.append(taps)
    scale = max(float(level.abs().max()) for level in found[0]['neck'])
    for layer in layers:
        for ours, theirs in zip(tensors(found[1][layer]), tensors(found[0][layer]), strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * max(scale, 1)


# --- layout


class Views(Tiny):
    """An operation that refuses channels_last, and for several images alone, as in DMNet."""

    def __init__(self):
        super().__init__(conv=conv())

    def compute(self, x):
        x = self.conv(x)
        return x.view(1, -1, *x.shape[2:]).view(x.shape)


class ReadsMemory(Tiny):
    """An operation that reads memory as NCHW, whatever the strides say."""

    def __init__(self):
        super().__init__(conv=conv())

    def compute(self, x):
        x = self.conv(x)
        return x.as_strided(x.shape, torch.empty(x.shape).stride())


class Deformable(Tiny):
    """A deformable convolution that says too little for a comparison to show what it reads."""

    def __init__(self):
        super().__init__(conv=conv(), deformable=ModulatedDeformConv2dPack(3, 3, 3, padding=1))
        nn.init.normal_(self.deformable.conv_offset.weight)

    def compute(self, x):
        return self.conv(x) + 1e-4 * self.deformable(x)


class TwoStages(Tiny):
    """The second stage runs on regions, which nobody taps."""

    def __init__(self):
        super().__init__(conv=conv(), second=conv())

    def compute(self, x):
        return self.conv(x)


def is_channels_last(module):
    return module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('model', 'last'), [(Chain, True), (TwoStages, True), (Views, False), (ReadsMemory, False), (Deformable, False)]
)
def test_the_layout_is_channels_last_where_that_changes_nothing(model, last, images):
    model = model()
    expected = neck(model, images)
    assert accelerate(model, ('neck',), SIZE)[1] is last
    layout = torch.channels_last if last else torch.contiguous_format
    torch.testing.assert_close(neck(model, images.contiguous(memory_format=layout)), expected)
    convs = [
        each for each in model.modules() if isinstance(each, nn.Conv2d) and each is not getattr(model, 'second', None)
    ]
    assert all(is_channels_last(each) == last for each in convs)


def test_what_is_not_run_keeps_its_layout():
    model = TwoStages()
    accelerate(model, ('neck',), SIZE)
    assert is_channels_last(model.conv)
    assert not is_channels_last(model.second)


@pytest.mark.parametrize('kind', ['DCNv2', 'ConvWS'])
def test_a_second_stage_runs_on_regions_as_in_the_stock_model(kind):
    """Its convolutions read memory as NCHW, or refuse another layout; the neck before them is in channels_last."""
    conv_cfg = dict(type=kind) if kind == 'ConvWS' else dict(type=kind, deform_groups=1)
    head = dict(type='ConvFCBBoxHead', num_shared_convs=2, num_shared_fcs=1, conv_out_channels=16, conv_cfg=conv_cfg)
    config = detectors.faster_rcnn(roi_head=dict(bbox_head=head))
    stock, teacher = (models.build(config, seed=0).eval() for _ in range(2))
    for model in (stock, teacher):
        for name, parameter in model.named_parameters():
            if 'conv_offset' in name:
                nn.init.constant_(parameter, 0.05)
    assert accelerate(teacher, ('neck',), (64, 64))[1]
    images, rois = torch.randn(2, 3, 64, 64), torch.tensor([[0, 4.0, 4, 40, 60], [1, 10, 0, 60, 30]])
    with torch.no_grad():
        found = []
        for model, layout in ((stock, torch.contiguous_format), (teacher, torch.channels_last)):
            with Taps(model, ('neck',)) as taps:
                run(model, ('neck',), images.contiguous(memory_format=layout), None)
            head = RoIHead()
            found.append(head.predict(taps, head.pool(taps, 'neck', rois)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# --- what a model puts out


class Random(Chain):
    def compute(self, x):
        return super().compute(x) + torch.rand(())


def test_a_model_that_draws_random_numbers_is_named_in_the_log(log):
    folded, last = accelerate(Random(), ('neck',), SIZE)
    assert (folded, last) == (2, True)  # the same numbers are drawn when outputs are compared
    assert 'Random: it draws random numbers in eval mode as well' in log.text


def test_other_models_are_not(log):
    accelerate(Chain(), ('neck',), SIZE)
    assert 'random numbers' not in log.text


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_outputs_that_are_not_finite_are_an_error(value):
    model = Chain()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(ConfigError, match=r"layer 'neck' of Chain puts out values that are not finite.*damaged"):
        accelerate(model, ('neck',), SIZE)


class Several(Tiny):
    """Layers also put out masks, sizes and nothing at all."""

    def __init__(self):
        super().__init__(conv=conv(), norm=nn.BatchNorm2d(3))

    def compute(self, x):
        x = self.norm(self.conv(x))
        return x, x > 100, torch.tensor(x.shape), x[:0]


def test_tensors_of_any_kind_are_compared():
    assert accelerate(Several(), ('neck',), SIZE) == (1, True)
