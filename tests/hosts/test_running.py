import pytest
import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.structures import BaseDataElement
from torch import nn

from mmkd.distill import distill
from mmkd.errors import ConfigError
from mmkd.hosts.running import CannotRun, at_first_size, probe, run, sizes_to_probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.stock import small_config


class Tiny(BaseModel):
    """A model that runs over images of one size alone, if one is given."""

    def __init__(self, size=None):
        super().__init__(ImgDataPreprocessor())
        self.data_preprocessor.size = size
        self.neck = nn.Conv2d(3, 4, 3, stride=8)
        self.size = size

    def extract_feat(self, inputs):
        if self.size and inputs.shape[2:] != torch.Size(self.size):
            raise RuntimeError(f'expected images of {self.size}\n(in three lines,\nas torch has them)')
        return self.neck(inputs)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=self.extract_feat(inputs).mean())


def test_run_goes_no_further_than_the_neck():
    model = models.build(detectors.retinanet())
    calls = []
    model.bbox_head.register_forward_hook(lambda *_: calls.append('head'))
    run(model, ['backbone.layer1', 'neck'], torch.randn(1, 3, 64, 64), None)
    assert not calls
    run(model, ['neck', 'bbox_head.retina_cls'], torch.randn(1, 3, 64, 64), None)
    assert calls == ['head']


def test_a_probe_leaves_no_trace():
    model = models.build(detectors.retinanet(backbone=dict(norm_eval=False))).train()
    model.neck.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    probe(model, ['neck', 'bbox_head'])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_detector_with_a_transformer_runs_no_further_than_the_neck():
    class Detr(Tiny):
        def forward_transformer(self):
            """What tells such a detector from others."""

        def forward(self, inputs, data_samples=None, mode='tensor'):
            raise AssertionError('the transformer is run')

    assert probe(Detr(), ['neck']).calls == {'neck': 1}


def test_a_probe_gives_detectors_what_they_ask_of_an_image():
    """Proposals to Fast R-CNN; objects, of which there are none, to Sparse R-CNN."""
    fast = detectors.faster_rcnn(type='FastRCNN')
    del fast.rpn_head
    (logits, _) = probe(models.build(fast), ['roi_head.bbox_head'])['roi_head.bbox_head']
    assert len(logits) > 1  # so that no layer of regions is taken for one of images
    sparse = small_config('mmdet/sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py')
    layer = 'roi_head.bbox_head.0.fc_cls'
    assert probe(models.build(sparse, seed=0), [layer])[layer][0].shape == (20, 80)


def test_a_probe_knows_whether_random_numbers_were_drawn():
    """SegNeXt's head draws its bases in each pass, in eval mode as well."""
    layer = 'decode_head.conv_seg'
    segnext = models.build(small_config('mmseg/segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'))
    state = torch.get_rng_state()
    assert probe(segnext, [layer]).random
    assert torch.equal(torch.get_rng_state(), state)  # that of others stays as it was
    assert not probe(segnext, ['backbone']).random
    assert not probe(models.build(segmentors.pspnet()), [layer]).random


# --- what does not run


def test_an_error_of_the_model_is_one_line():
    message = r"teacher: Tiny cannot be run as far as 'neck' over images of 96x160 \(RuntimeError: expected .*128\)\); tap other"
    with pytest.raises(CannotRun, match=message) as error:
        probe(Tiny((128, 128)), ['neck'], size=(96, 160), name='teacher')
    assert '\n' not in str(error.value)
    assert isinstance(error.value, ConfigError)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_an_error_without_a_text_is_named():
    class Silent(Tiny):
        def extract_feat(self, inputs):
            raise AssertionError

    with pytest.raises(CannotRun, match=r'\(AssertionError: AssertionError\)'):
        probe(Silent(), ['neck'])


def test_a_clear_error_stays_as_it_is():
    with pytest.raises(ConfigError, match='has no such module') as error:
        probe(Tiny(), ['nack'])
    assert not isinstance(error.value, CannotRun)


def test_a_model_of_several_branches_is_no_student():
    model = Tiny()
    model.data_preprocessor.data_preprocessor = ImgDataPreprocessor()
    with pytest.raises(ConfigError, match='student: Tiny is trained on several branches.*distil the model inside'):
        probe(model, ['neck'], trains=True, name='student')
    assert probe(model, ['neck'])['neck']


# --- sizes


@pytest.mark.parametrize(
    ('own', 'sizes'),
    [
        ([None], [(256, 256), (512, 512)]),
        ([(640, 320)], [(256, 256), (640, 320), (512, 512)]),
        ([224, None, 224], [(256, 256), (224, 224), (512, 512)]),
        ([(512, 512)], [(256, 256), (512, 512)]),
    ],
)
def test_sizes_to_probe_are_those_of_the_models_data(own, sizes):
    assert sizes_to_probe([Tiny(size) for size in own]) == sizes


@pytest.mark.parametrize('size', [None, (96, 160), (512, 512)])
def test_the_first_size_at_which_student_and_teacher_run(size):
    model = distill(Tiny(size), Tiny(size), dict(cwd=dict(type='CWD', layer='neck')))
    assert model.sources['teacher'].size == (size or (256, 256))
    model.sources['teacher'].load()
    assert model(torch.randn(2, 3, *(size or (64, 64))), None, mode='loss')['cwd.loss'] > 0


def test_no_size_at_which_they_run_is_an_error():
    with pytest.raises(CannotRun, match='student: Tiny cannot be run .* 512x512'):
        distill(
            Tiny((96, 96)),
            Tiny((100, 100)),
            dict(cwd=dict(type='CWD', layer='neck')),
        )


def test_other_errors_end_the_search():
    tried = []

    def attempt(size):
        tried.append(size)
        raise ConfigError('no such layer')

    with pytest.raises(ConfigError, match='no such layer'):
        at_first_size([(256, 256), (512, 512)], attempt)
    assert tried == [(256, 256)]


# --- segmentors


def segmentor_batch(model):
    labels = models.build(segmentors.pspnet())  # what a batch needs to know of a segmentor
    return model.data_preprocessor(random_batch(labels, (2, 3, 64, 96)), True)


@pytest.mark.parametrize(
    ('config', 'layers'),
    [
        (segmentors.pspnet(), ['auxiliary_head.conv_seg', 'decode_head.conv_seg', 'backbone.layer2']),
        (segmentors.pspnet(), ['auxiliary_head.convs.0']),
        (segmentors.segformer(), ['decode_head.fusion_conv', 'decode_head.conv_seg']),
        (segmentors.cascade(), ['decode_head.0.conv_seg', 'decode_head.1.bottleneck', 'decode_head.1.conv_seg']),
    ],
)
def test_heads_of_a_segmentor_run_as_in_training(config, layers):
    """Auxiliary ones too, which mmseg's tensor mode leaves out; of a cascade each head takes the one before."""
    model = models.build(config, seed=0).eval()
    batch = segmentor_batch(model)
    with torch.no_grad(), Taps(model, layers) as expected:
        model(**batch, mode='loss')
    with torch.no_grad(), Taps(model, layers) as taps:
        run(model, layers, **batch)
    for layer in layers:
        assert torch.equal(taps[layer][0], expected[layer][0])
        assert len(taps[layer]) == 1  # in training a cascade calls its first head twice


def test_only_the_wanted_heads_of_a_segmentor_run():
    model = models.build(segmentors.pspnet()).eval()
    calls = []
    for name in ('decode_head.conv_seg', 'auxiliary_head.conv_seg'):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    images = torch.randn(1, 3, 64, 64)
    for layers in (['backbone.layer4'], ['auxiliary_head.conv_seg'], ['decode_head.bottleneck']):
        run(model, layers, images, None)
    assert calls == ['auxiliary_head.conv_seg', 'decode_head.conv_seg']


@pytest.mark.parametrize('layer', ['decode_head', 'auxiliary_head'])
def test_a_segmentors_head_as_a_whole_is_an_error_with_advice(layer):
    model = models.build(segmentors.pspnet())
    with pytest.raises(ConfigError, match=rf"{layer!r} .*never called.*tap '{layer}.conv_seg', not {layer!r}"):
        probe(model, [layer])[layer]


def test_a_cascade_learns_from_a_cascade(tmp_path):
    teacher = segmentors.cascade(24)
    layers = dict(last='decode_head.1.conv_seg', first='decode_head.0.conv_seg')
    model = distill(
        models.build(segmentors.cascade(), seed=0),
        dict(config=teacher, checkpoint=models.save_weights(teacher, tmp_path / 'teacher.pth')),
        {name: dict(type='KD', layer=layer) for name, layer in layers.items()},
    )
    model.sources['teacher'].load()
    losses = model.train()(**segmentor_batch(model), mode='loss')
    for index, name in enumerate(('first', 'last')):
        assert losses[f'{name}.loss'] > 0
        (gradient,) = torch.autograd.grad(
            losses[f'{name}.loss'], model.decode_head[index].conv_seg.weight, retain_graph=True
        )
        assert gradient.any()


def test_only_the_wanted_stages_of_a_cascade_run():
    """PointRend's second stage, for one, cannot be run alone."""
    model = models.build(segmentors.cascade()).eval()
    calls = []
    for stage in (0, 1):
        model.decode_head[stage].conv_seg.register_forward_hook(lambda *_, stage=stage: calls.append(stage))
    images = torch.randn(1, 3, 64, 64)
    run(model, ['decode_head.0.conv_seg'], images, None)
    assert calls == [0]
    run(model, ['decode_head.1.bottleneck:input', 'backbone'], images, None)
    assert calls == [0, 0, 1]


@pytest.mark.parametrize('stages', [2, 3])
def test_a_cascade_calls_its_heads_as_often_as_in_training(stages):
    config = segmentors.cascade()
    config.decode_head += config.decode_head[-1:] * (stages - 2)
    config.num_stages = stages
    model = models.build(config, seed=0).eval()
    layers, batch = [f'decode_head.{stage}.conv_seg' for stage in range(stages)], segmentor_batch(model)
    with torch.no_grad(), Taps(model, layers) as expected:
        model(**batch, mode='loss')
    with torch.no_grad(), Taps(model, layers) as taps:
        run(model, layers, **batch, trains=True)
    assert taps.calls == expected.calls == {layer: 1 if layer == layers[-1] else 2 for layer in layers}
    for layer in layers:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(taps[layer], expected[layer], strict=True))


class QueryHead(BaseModel):
    """What MaskFormer and its kin ask for: the images' sizes."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x, batch_data_samples):
        self.seen = [sample.metainfo for sample in batch_data_samples]
        return x


def test_a_head_of_queries_is_given_the_sizes_of_the_images():
    model = Tiny()
    model.decode_head = QueryHead()
    data_samples = [BaseDataElement(metainfo=dict(img_shape=(60, 64), pad_shape=(64, 64)))]
    with Taps(model, ['decode_head']) as taps:
        run(model, ['decode_head'], torch.randn(1, 3, 64, 64), data_samples)
    assert model.decode_head.seen == [dict(img_shape=(60, 64), pad_shape=(64, 64), batch_input_shape=(60, 64))]
    assert 'batch_input_shape' not in data_samples[0].metainfo
    assert taps.calls == {'decode_head': 1}


@pytest.mark.parametrize('method', ['CWD', 'KD', 'PKD'])
def test_both_heads_of_a_cascade_learn(method):
    """mmseg calls the first one twice in training."""
    layers = ['decode_head.0.conv_seg', 'decode_head.1.conv_seg']
    student, teacher = (models.build(segmentors.cascade(channels), seed=0) for channels in (16, 24))
    model = distill(student, teacher, dict(it=dict(type=method, layer=layers)))
    model.sources['teacher'].load()
    loss = model.train()(**segmentor_batch(model), mode='loss')['it.loss']
    for index in (0, 1):
        (gradient,) = torch.autograd.grad(loss, model.decode_head[index].conv_seg.weight, retain_graph=True)
        assert gradient.any(), index
