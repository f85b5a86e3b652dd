import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.hosts.segmentation.logits import require_class_logits, resize_logits
from mmkd.testing import models, segmentors

LAYER = 'decode_head.conv_seg'


def test_logits_of_the_same_classes_pass_whatever_their_sizes():
    student, teacher = (probe(models.build(each), [LAYER]) for each in (segmentors.pspnet(), segmentors.deeplabv3(24)))
    assert student[LAYER][0].shape[2:] != teacher[LAYER][0].shape[2:]
    assert require_class_logits(student, LAYER, teacher, LAYER) is None
    two = probe(models.build(segmentors.pspnet(classes=2)), [LAYER])
    assert require_class_logits(two, LAYER, two, LAYER) is None


def test_other_numbers_of_channels_are_an_error():
    student = probe(models.build(segmentors.pspnet()), [LAYER])
    teacher = probe(models.build(segmentors.pspnet(classes=7)), [LAYER, 'decode_head.bottleneck'])
    for layer, channels in ((LAYER, 7), ('decode_head.bottleneck', 16)):
        with pytest.raises(ConfigError, match=rf"puts out 19 channels and '{layer}' of the teacher {channels};.*tap"):
            require_class_logits(student, LAYER, teacher, layer)


@pytest.mark.parametrize('align', [False, True])
def test_logits_are_resized_as_the_heads_loss_does(align):
    model = models.build(segmentors.pspnet(decode_head=dict(align_corners=align)))
    cascade = torch.nn.Module()
    cascade.decode_head = torch.nn.ModuleList([torch.nn.Module(), model.decode_head])
    ramp = torch.arange(4.0)[None, None, None].expand(1, 2, 3, 4)
    for each in (model, cascade):
        found = resize_logits(ramp, (3, 7), each)
        assert found.shape == (1, 2, 3, 7)
        # corner pixels' centres coincide, or corners do
        expected = [0, 0.5, 1, 1.5, 2, 2.5, 3] if align else [0, 5 / 14, 13 / 14, 1.5, 29 / 14, 37 / 14, 3]
        assert found[0, 1, 2].tolist() == pytest.approx(expected)
