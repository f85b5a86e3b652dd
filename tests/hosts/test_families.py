"""One model of every family of mmdet 3.3 and mmseg 1.2, from the configs that they come with."""

from typing import Any, NamedTuple

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.distill import distill
from mmkd.errors import ConfigError
from mmkd.hosts.running import at_first_size, probe, run, sizes_to_probe
from mmkd.sources import Teacher
from mmkd.taps import Taps, tensors
from mmkd.testing.stock import build_random, config_root, small_config

pytestmark = pytest.mark.slow


class Family(NamedTuple):
    config: str
    layers: tuple[str, ...] | None = None
    """What is tapped; by default the neck or backbone, and the heads that can be run alone."""
    narrow: int = 8
    size: int | None = None
    """Of the images; by default one that distill() finds."""
    changes: dict[str, Any] = {}


FAMILIES = {
    'mmdet/albu_example': Family('mask-rcnn_r50_fpn_albu-1x_coco.py'),
    'mmdet/atss': Family('atss_r50_fpn_1x_coco.py'),
    'mmdet/autoassign': Family('autoassign_r50-caffe_fpn_1x_coco.py'),
    'mmdet/cascade_rcnn': Family('cascade-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/cascade_rpn': Family('cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py', ('neck',)),
    'mmdet/centernet': Family(
        'centernet_r18-dcnv2_8xb16-crop512-140e_coco.py', changes=dict(neck=dict(num_deconv_filters=(32, 16, 8)))
    ),
    'mmdet/centripetalnet': Family(
        'centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py',
        changes=dict(backbone=dict(feat_channel=32)),
        size=128,
    ),
    'mmdet/cityscapes': Family('faster-rcnn_r50_fpn_1x_cityscapes.py'),
    'mmdet/condinst': Family('condinst_r50_fpn_ms-poly-90k_coco_instance.py'),
    'mmdet/conditional_detr': Family('conditional-detr_r50_8xb2-50e_coco.py', narrow=1, size=64),
    'mmdet/cornernet': Family(
        'cornernet_hourglass104_8xb6-210e-mstest_coco.py',
        changes=dict(backbone=dict(feat_channel=32)),
        size=128,
    ),
    'mmdet/crowddet': Family('crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py'),
    'mmdet/dab_detr': Family('dab-detr_r50_8xb2-50e_coco.py'),
    'mmdet/dcn': Family('cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'),
    'mmdet/dcnv2': Family('faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py'),
    'mmdet/ddod': Family('ddod_r50_fpn_1x_coco.py'),
    'mmdet/ddq': Family('ddq-detr-4scale_r50_8xb2-12e_coco.py', changes=dict(bbox_head=dict(embed_dims=32))),
    'mmdet/deepfashion': Family('mask-rcnn_r50_fpn_15e_deepfashion.py'),
    'mmdet/deformable_detr': Family(
        'deformable-detr_r50_16xb2-50e_coco.py', changes=dict(bbox_head=dict(embed_dims=32))
    ),
    'mmdet/detectors': Family('detectors_cascade-rcnn_r50_1x_coco.py'),
    'mmdet/detr': Family('detr_r50_8xb2-150e_coco.py'),
    'mmdet/dino': Family('dino-4scale_r50_8xb2-12e_coco.py', narrow=1, size=64),
    'mmdet/double_heads': Family('dh-faster-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/dsdl': Family('coco.py'),
    'mmdet/dyhead': Family('atss_r50_fpn_dyhead_1x_coco.py'),
    'mmdet/dynamic_rcnn': Family('dynamic-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/efficientnet': Family('retinanet_effb3_fpn_8xb4-crop896-1x_coco.py', narrow=1, size=64),
    'mmdet/empirical_attention': Family('faster-rcnn_r50-attn1111-dcn_fpn_1x_coco.py', size=128),
    'mmdet/fast_rcnn': Family('fast-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/faster_rcnn': Family('faster-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/fcos': Family('fcos_r50_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py'),
    'mmdet/foveabox': Family('fovea_r50_fpn_gn-head-align_4xb4-2x_coco.py'),
    'mmdet/fpg': Family('faster-rcnn_r50_fpg_crop640-50e_coco.py'),
    'mmdet/free_anchor': Family('freeanchor_r50_fpn_1x_coco.py'),
    'mmdet/fsaf': Family('fsaf_r50_fpn_1x_coco.py'),
    'mmdet/gcnet': Family('mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco.py'),
    'mmdet/gfl': Family('gfl_r101-dconv-c3-c5_fpn_ms-2x_coco.py'),
    'mmdet/ghm': Family('retinanet_r50_fpn_ghm-1x_coco.py'),
    'mmdet/gn': Family('mask-rcnn_r50_fpn_gn-all_2x_coco.py'),
    'mmdet/gn+ws': Family('faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py'),
    'mmdet/grid_rcnn': Family('grid-rcnn_r50_fpn_gn-head_1x_coco.py'),
    'mmdet/groie': Family('faste-rcnn_r50_fpn_groie_1x_coco.py'),
    'mmdet/guided_anchoring': Family('ga-retinanet_r50_fpn_1x_coco.py', layers=('neck',)),
    'mmdet/hrnet': Family('faster-rcnn_hrnetv2p-w18-1x_coco.py', narrow=1, size=64),
    'mmdet/htc': Family('htc_r50_fpn_1x_coco.py'),
    'mmdet/instaboost': Family('mask-rcnn_r50_fpn_instaboost-4x_coco.py'),
    'mmdet/lad': Family('lad_r50-paa-r101_fpn_2xb8_coco_1x.py'),
    'mmdet/legacy_1.x': Family('retinanet_r50_fpn_1x_coco_v1.py'),
    'mmdet/libra_rcnn': Family('libra-faster-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/lvis': Family('mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py'),
    'mmdet/mask2former': Family(
        'mask2former_r50_8xb2-lsj-50e_coco.py', ('backbone', 'panoptic_head.pixel_decoder', 'panoptic_head.cls_embed')
    ),
    'mmdet/mask_rcnn': Family('mask-rcnn_r50_fpn_1x_coco.py'),
    'mmdet/maskformer': Family(
        'maskformer_r50_ms-16xb1-75e_coco.py', ('backbone', 'panoptic_head.pixel_decoder', 'panoptic_head.cls_embed')
    ),
    'mmdet/ms_rcnn': Family('ms-rcnn_r50-caffe_fpn_1x_coco.py'),
    'mmdet/nas_fcos': Family('nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py'),
    'mmdet/nas_fpn': Family('retinanet_r50_nasfpn_crop640-50e_coco.py'),
    'mmdet/objects365': Family('retinanet_r50-syncbn_fpn_1350k_objects365v1.py'),
    'mmdet/openimages': Family('faster-rcnn_r50_fpn_32xb2-1x_openimages.py'),
    'mmdet/paa': Family('paa_r50_fpn_1x_coco.py'),
    'mmdet/pafpn': Family('faster-rcnn_r50_pafpn_1x_coco.py'),
    'mmdet/panoptic_fpn': Family('panoptic-fpn_r50_fpn_1x_coco.py'),
    'mmdet/pascal_voc': Family('faster-rcnn_r50-caffe-c4_ms-18k_voc0712.py'),
    'mmdet/pisa': Family('faster-rcnn_r50_fpn_pisa_1x_coco.py'),
    'mmdet/point_rend': Family('point-rend_r50-caffe_fpn_ms-1x_coco.py'),
    'mmdet/pvt': Family('retinanet_pvt-t_fpn_1x_coco.py'),
    'mmdet/queryinst': Family('queryinst_r50_fpn_1x_coco.py', ('neck',)),
    'mmdet/regnet': Family('mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco.py', narrow=1, size=64),
    'mmdet/reppoints': Family('reppoints-moment_r101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py'),
    'mmdet/res2net': Family('faster-rcnn_res2net-101_fpn_2x_coco.py', size=128),
    'mmdet/resnest': Family('faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py'),
    'mmdet/resnet_strikes_back': Family('retinanet_r50-rsb-pre_fpn_1x_coco.py'),
    'mmdet/retinanet': Family('retinanet_r50_fpn_1x_coco.py'),
    'mmdet/rpn': Family('rpn_r50_fpn_1x_coco.py'),
    'mmdet/rtmdet': Family('rtmdet_l_8xb32-300e_coco.py'),
    'mmdet/sabl': Family('sabl-retinanet_r50_fpn_1x_coco.py'),
    'mmdet/scnet': Family('scnet_r50_fpn_1x_coco.py'),
    'mmdet/scratch': Family('faster-rcnn_r50-scratch_fpn_gn-all_6x_coco.py'),
    'mmdet/seesaw_loss': Family('mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py'),
    'mmdet/selfsup_pretrain': Family('mask-rcnn_r50-mocov2-pre_fpn_1x_coco.py'),
    'mmdet/simple_copy_paste': Family('mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-90k_coco.py'),
    'mmdet/solo': Family('solo_r50_fpn_1x_coco.py', ('neck', 'mask_head.conv_cls'), size=128),
    'mmdet/solov2': Family('solov2_r101-dcn_fpn_ms-3x_coco.py', ('neck', 'mask_head.conv_cls'), size=128),
    'mmdet/sort': Family('faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py'),
    'mmdet/sparse_rcnn': Family('sparse-rcnn_r50_fpn_1x_coco.py', ('neck',)),
    'mmdet/ssd': Family(
        'ssd300_coco.py', narrow=1, size=300, changes=dict(backbone=dict(depth=11, out_feature_indices=(14, 24)))
    ),
    'mmdet/strong_baselines': Family('mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco.py'),
    'mmdet/swin': Family('mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    'mmdet/tood': Family('tood_r101-dconv-c3-c5_fpn_ms-2x_coco.py'),
    'mmdet/tridentnet': Family('tridentnet_r50-caffe_1x_coco.py'),
    'mmdet/v3det': Family('fcos_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py', layers=('neck',)),
    'mmdet/vfnet': Family('vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py'),
    'mmdet/wider_face': Family('retinanet_r50_fpn_1x_widerface.py'),
    'mmdet/yolact': Family('yolact_r50_1xb8-55e_coco.py'),
    'mmdet/yolo': Family('yolov3_mobilenetv2_8xb24-320-300e_coco.py', narrow=1, size=64),
    'mmdet/yolof': Family('yolof_r50-c5_8xb8-1x_coco.py'),
    'mmdet/yolox': Family('yolox_l_8xb8-300e_coco.py'),
    'mmseg/ann': Family('ann_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/apcnet': Family('apcnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/beit': Family(
        'beit-base_upernet_8xb2-160k_ade20k-640x640.py',
        changes=dict(backbone=dict(img_size=(128, 128)), data_preprocessor=dict(size=(128, 128))),
    ),
    'mmseg/bisenetv1': Family('bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py'),
    'mmseg/bisenetv2': Family('bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'),
    'mmseg/ccnet': Family('ccnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/cgnet': Family('cgnet_fcn_4xb4-60k_cityscapes-680x680.py', narrow=1),
    'mmseg/danet': Family('danet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/ddrnet': Family('ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py'),
    'mmseg/deeplabv3': Family('deeplabv3_r101-d16-mg124_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/deeplabv3plus': Family('deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/dmnet': Family('dmnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/dnlnet': Family('dnl_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/dpt': Family('dpt_vit-b16_8xb2-160k_ade20k-512x512.py'),
    'mmseg/dsdl': Family('cityscapes.py'),
    'mmseg/emanet': Family('emanet_r50-d8_4xb2-80k_cityscapes-512x1024.py'),
    'mmseg/encnet': Family('encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/erfnet': Family('erfnet_fcn_4xb4-160k_cityscapes-512x1024.py', narrow=1, size=128),
    'mmseg/fastfcn': Family('fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024.py'),
    'mmseg/fastscnn': Family('fast_scnn_8xb4-160k_cityscapes-512x1024.py'),
    'mmseg/fcn': Family('fcn-d6_r50-d16_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/gcnet': Family('gcnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/hrnet': Family('fcn_hr18s_4xb4-80k_ade20k-512x512.py', narrow=1, size=64),
    'mmseg/icnet': Family('icnet_r50-d8_4xb2-80k_cityscapes-832x832.py'),
    'mmseg/isanet': Family('isanet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/knet': Family(
        'knet-s3_r50-d8_deeplabv3_8xb2-adamw-80k_ade20k-512x512.py',
        ('backbone', 'decode_head.kernel_generate_head.conv_seg', 'decode_head.kernel_update_head.2.fc_mask'),
    ),
    'mmseg/mae': Family(
        'mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
        changes=dict(backbone=dict(img_size=(128, 128)), data_preprocessor=dict(size=(128, 128))),
    ),
    'mmseg/mask2former': Family(
        'mask2former_r50_8xb2-90k_cityscapes-512x1024.py',
        ('backbone', 'decode_head.pixel_decoder', 'decode_head.cls_embed'),
    ),
    'mmseg/maskformer': Family(
        'maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',
        ('backbone', 'decode_head.pixel_decoder', 'decode_head.cls_embed'),
    ),
    'mmseg/mobilenet_v2': Family('mobilenet-v2-d8_pspnet_4xb4-160k_ade20k-512x512.py', narrow=1, size=64),
    'mmseg/mobilenet_v3': Family(
        'mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py',
        narrow=1,
        changes=dict(data_preprocessor=dict(size=(400, 400))),
    ),
    'mmseg/nonlocal_net': Family('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/ocrnet': Family('ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/pidnet': Family(
        'pidnet-s_2xb6-120k_1024x1024-cityscapes.py', ('backbone.spp', 'decode_head.i_head', 'decode_head.conv_seg')
    ),
    'mmseg/point_rend': Family(
        'pointrend_r50_4xb2-80k_cityscapes-512x1024.py', ('backbone', 'neck', 'decode_head.0.conv_seg')
    ),
    'mmseg/psanet': Family(
        'psanet_r50-d8_4xb4-20k_voc12aug-512x512.py', size=64, changes=dict(decode_head=dict(mask_size=(8, 8)))
    ),
    'mmseg/pspnet': Family('pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'mmseg/resnest': Family('resnest_s101-d8_pspnet_4xb4-160k_ade20k-512x512.py'),
    'mmseg/segformer': Family('segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
    'mmseg/segmenter': Family(
        'segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py', ('backbone', 'decode_head.mask_norm')
    ),
    'mmseg/segnext': Family('segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'),
    'mmseg/sem_fpn': Family('fpn_r50_4xb4-160k_ade20k-512x512.py'),
    'mmseg/setr': Family('setr_vit-l_naive_8xb2-160k_ade20k-512x512.py', size=128),
    'mmseg/stdc': Family('stdc1_4xb12-80k_cityscapes-512x1024.py'),
    'mmseg/swin': Family('swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'),
    'mmseg/twins': Family('twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py'),
    'mmseg/unet': Family('unet-s5-d16_fcn_4xb4-40k_drive-64x64.py'),
    'mmseg/upernet': Family('upernet_r50_4xb4-80k_ade20k-512x512.py'),
    'mmseg/vit': Family('vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py'),
}


NCHW = {
    *(f'mmdet/{each}' for each in ('centernet', 'centripetalnet', 'dcn', 'dcnv2', 'ddod', 'detectors', 'dyhead')),
    *(f'mmdet/{each}' for each in ('empirical_attention', 'foveabox', 'gfl', 'gn+ws', 'nas_fcos', 'regnet')),
    *(f'mmdet/{each}' for each in ('reppoints', 'solov2', 'tood', 'vfnet')),
    *(f'mmseg/{each}' for each in ('dmnet', 'psanet')),
}
"""Families whose teachers keep the layout of NCHW."""

UNFOLDED = {'mmdet/detectors'}
"""Families with batch norms, all of them behind convolutions of another kind."""

NOT_HERE = {
    'mmdet/boxinst': 'needs scikit-image',
    'mmdet/bytetrack': 'needs lap',
    'mmdet/common': 'has no models',
    'mmdet/convnext': 'needs mmpretrain',
    'mmdet/deepsort': 'needs mmpretrain',
    'mmdet/glip': 'needs transformers',
    'mmdet/grounding_dino': 'needs transformers',
    'mmdet/ld': 'distils by itself, and reads its teacher from a folder beside the working one',
    'mmdet/misc': 'needs detectron2',
    'mmdet/mm_grounding_dino': 'needs transformers',
    'mmdet/ocsort': 'needs lap',
    'mmdet/reid': 'needs mmpretrain',
    'mmdet/strongsort': 'needs mmpretrain',
    'mmdet/timm_example': 'needs mmpretrain',
    'mmseg/convnext': 'needs mmpretrain',
    'mmseg/poolformer': 'needs mmpretrain',
    'mmseg/vpd': 'needs the packages of stable diffusion',
}


class Refused(NamedTuple):
    config: str
    layer: str
    message: str
    changes: dict[str, Any] = {}


REFUSED = {
    'mmdet/carafe': Refused(
        'faster-rcnn_r50_fpn-carafe_1x_coco.py',
        'neck',
        r"FasterRCNN cannot be run as far as 'neck' over .* \(RuntimeError: carafe.* for device cpu not found",
    ),
    'mmdet/mask2former_vis': Refused(
        'mask2former_r50_8xb2-8e_youtubevis2019.py',
        'backbone',
        r"Mask2FormerVideo cannot be run as far as 'backbone' over .* no attribute 'extract_feat'",
    ),
    'mmdet/masktrack_rcnn': Refused(
        'masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py',
        'detector.neck',
        r"MaskTrackRCNN cannot be run as far as 'detector.neck' over .*\(NotImplementedError: .*not supported",
    ),
    'mmdet/qdtrack': Refused(
        'qdtrack_faster-rcnn_r50_fpn_4e_base.py',
        'detector.neck',
        r"QDTrack cannot be run as far as 'detector.neck' over .*\(NotImplementedError: .*not supported",
    ),
    'mmdet/soft_teacher': Refused(
        'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'teacher.neck',
        'SoftTeacher is trained on several branches of images at once; distil the model inside it',
    ),
    'mmseg/san': Refused(
        'san-vit-b16_coco-stuff164k-640x640.py',
        'image_encoder',
        r"MultimodalEncoderDecoder cannot be run as far as 'image_encoder' over",
        dict(decode_head=dict(maskgen_cfg=dict(sos_token_num=20))),
    ),
}
"""Families that are not distilled."""

REFUSED_LAYERS = {
    'mmdet/cascade_rpn': ('rpn_head', r'CascadeRPNHead. is missing the required "forward"'),
    'mmdet/detr': ('bbox_head.fc_cls', r'puts out 2 rows for 1 images \(regions or queries'),
    'mmdet/faster_rcnn': ('roi_head.bbox_roi_extractor', r'puts out \d+ rows for 1 images \(regions or queries'),
    'mmdet/mask2former': ('neck', "Mask2Former has no such module; the nearest are 'backbone'"),
    'mmdet/mask_rcnn': ('roi_head.mask_head.conv_logits', r'puts out \d+ rows for 1 images \(regions or queries'),
    'mmdet/solo': ('mask_head', "layer 'mask_head' of SOLO was never called"),
    'mmseg/mask2former': ('decode_head.cls_embed', r'expected \(B, C, H, W\) maps'),
    'mmseg/point_rend': ('decode_head.1.fc_seg', "cannot be run as far as 'decode_head.1.fc_seg' over"),
    'mmseg/segmenter': ('decode_head.mask_norm', r'expected \(B, C, H, W\) maps'),
}
"""Layers that nothing is learnt from, of families whose other layers work."""


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_every_family_is_in_a_table(package):
    folders = {each.name for each in config_root(package).iterdir() if each.is_dir()} - {'_base_', '__pycache__'}
    named = [*FAMILIES, *REFUSED, *NOT_HERE]
    assert {f'{package}/{folder}' for folder in folders} == {name for name in named if name.startswith(package)}


def default_layers(model: nn.Module) -> tuple[str, ...]:
    names = dict(model.named_modules())
    if hasattr(model, 'decode_head'):
        return ('backbone', *(name for name in names if name.endswith('conv_seg') and name.count('.') <= 2))
    heads = ['encoder', 'decoder'] if hasattr(model, 'forward_transformer') else ['bbox_head', 'rpn_head']
    return ('neck' if 'neck' in names else 'backbone', *(name for name in heads if name in names))


def samples(model: nn.Module, size: tuple[int, int], number: int = 2) -> list:
    """Two images with one object of the first class each."""
    height, width = size
    metainfo = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    found = []
    for _ in range(number):
        if hasattr(model, 'decode_head'):
            sample = SegDataSample(metainfo=metainfo)
            labels = torch.zeros(1, height, width, dtype=torch.long)
            labels[:, height // 2 :] = 1
            sample.gt_sem_seg, sample.gt_edge_map = PixelData(data=labels), PixelData(data=labels)
        else:
            sample = DetDataSample(metainfo=metainfo)
            boxes = torch.tensor([[0.1, 0.2, 0.7, 0.8]]) * torch.tensor([width, height, width, height])
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(1, dtype=torch.long))
            sample.gt_instances.masks = BitmapMasks(
                torch.ones(1, height, width, dtype=torch.uint8).numpy(), height, width
            )
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        found.append(sample)
    return found


def differences(found: Taps, expected: Taps) -> dict[str, float]:
    """For each layer the largest difference of a tensor, relative to that tensor's largest value."""
    worst = {}
    for layer in expected:
        pairs = zip(tensors(found[layer]), tensors(expected[layer]), strict=True)
        worst[layer] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return worst


@pytest.mark.parametrize('name', FAMILIES)
def test_a_frozen_teacher_equals_the_stock_model(name):
    family = FAMILIES[name]
    stock = build_random(small_config(f'{name}/{family.config}', family.narrow, family.changes))
    stock.eval()  # of some models it returns None
    layers = family.layers or default_layers(stock)
    sizes = [(family.size, family.size)] if family.size else sizes_to_probe([stock])
    size, _ = at_first_size(sizes, lambda size: (size, probe(stock, layers, size=size)))
    teacher = Teacher(stock)
    teacher.layers, teacher.size = layers, size
    teacher.load()

    inputs, data_samples = torch.randn(2, 3, *size), samples(stock, size)
    with torch.random.fork_rng([]), torch.no_grad(), Taps(stock, layers) as expected:
        run(stock, layers, inputs, data_samples)
    found = teacher(inputs, data_samples)
    assert all(each.numel() > 1 and each.std() > 0 for layer in layers for each in tensors(expected[layer]))
    assert max(differences(found, expected).values()) < 1e-3
    norms = [sum(isinstance(each, _BatchNorm) for each in model.modules()) for model in (teacher.model, stock)]
    assert (norms[0] < norms[1]) == (norms[1] > 0 and name not in UNFOLDED)
    weights = [weight for weight in teacher.model.parameters() if weight.dim() == 4 and weight.shape[1:3].numel() > 1]
    assert all(weight.is_contiguous() for weight in weights) == (name in NCHW)


STEPS = {
    'mmdet/centernet': 'neck',
    'mmdet/dcn': 'neck',
    'mmdet/dcnv2': 'neck',
    'mmdet/ddod': 'bbox_head.atss_cls',
    'mmdet/deformable_detr': 'neck',
    'mmdet/detectors': 'neck',
    'mmdet/detr': 'neck',
    'mmdet/dyhead': 'bbox_head.atss_cls',
    'mmdet/gn+ws': 'neck',
    'mmdet/mask2former': 'panoptic_head.pixel_decoder.mask_feature',
    'mmdet/nas_fcos': 'neck',
    'mmdet/reppoints': 'bbox_head.reppoints_cls_out',
    'mmdet/retinanet': 'bbox_head.retina_cls',
    'mmdet/simple_copy_paste': 'neck',
    'mmdet/solov2': 'neck',
    'mmdet/ssd': 'neck',
    'mmdet/strong_baselines': 'neck',
    'mmdet/vfnet': 'bbox_head.vfnet_cls',
    'mmdet/yolox': 'neck',
    'mmseg/beit': 'decode_head.conv_seg',
    'mmseg/dmnet': 'decode_head.conv_seg',
    'mmseg/isanet': 'decode_head.conv_seg',
    'mmseg/knet': 'decode_head.kernel_generate_head.conv_seg',
    'mmseg/mae': 'decode_head.conv_seg',
    'mmseg/mask2former': 'decode_head.pixel_decoder.mask_feature',
    'mmseg/maskformer': 'decode_head.pixel_decoder.mask_feature',
    'mmseg/mobilenet_v3': 'decode_head.conv_seg',
    'mmseg/ocrnet': 'decode_head.1.conv_seg',
    'mmseg/pidnet': 'decode_head.conv_seg',
    'mmseg/point_rend': 'decode_head.0.conv_seg',
    'mmseg/psanet': 'decode_head.conv_seg',
    'mmseg/segformer': 'decode_head.conv_seg',
    'mmseg/segmenter': 'backbone',
    'mmseg/segnext': 'decode_head.conv_seg',
    'mmseg/setr': 'auxiliary_head.0.conv_seg',
}
"""Families that a student learns from a teacher of in one step, and the layer."""


@pytest.mark.parametrize('name', STEPS)
def test_a_student_learns_from_a_teacher_of_its_family(name):
    family = FAMILIES[name]
    config = small_config(f'{name}/{family.config}', family.narrow, family.changes)
    model = distill(
        build_random(config, seed=0), build_random(config, seed=1), dict(cwd=dict(type='CWD', layer=STEPS[name]))
    )
    teacher = model.sources['teacher']
    if family.size:
        teacher.size = family.size, family.size  # one that a step takes less time for
    teacher.load()
    size = (128, 128) if teacher.size == (256, 256) else teacher.size
    losses = model.train()(torch.randn(2, 3, *size), samples(model, size), mode='loss')
    assert losses['cwd.loss'] > 0
    losses['cwd.loss'].backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(torch.isfinite(each).all() for each in gradients)
    assert any(each.any() for each in gradients)


def assert_refused(config: dict, layer: str, message: str) -> None:
    model = build_random(config)
    with pytest.raises(ConfigError, match=message) as error:
        distill(model, model, dict(cwd=dict(type='CWD', layer=layer)))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', REFUSED)
def test_a_family_that_cannot_be_distilled_is_one_line(name):
    refused = REFUSED[name]
    assert_refused(small_config(f'{name}/{refused.config}', changes=refused.changes), refused.layer, refused.message)


@pytest.mark.parametrize('name', REFUSED_LAYERS)
def test_a_layer_that_cannot_be_compared_is_one_line(name):
    family = FAMILIES[name]
    assert_refused(small_config(f'{name}/{family.config}', changes=family.changes), *REFUSED_LAYERS[name])
