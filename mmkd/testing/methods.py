"""Every method on small models: what is run wherever all of them are to be tried."""

from mmkd.testing import detectors, segmentors

# student, teacher, distillers
DETECTION = {
    'RetinaNet': (
        detectors.retinanet,
        detectors.retinanet,
        dict(
            gid=dict(type='GID'),
            cwd=dict(type='CWD', layer='neck'),
            mimic=dict(type='Mimic', head='bbox_head'),
            fgd=dict(type='FGD'),
            mgd=dict(type='MGD', layer='neck'),
            pkd=dict(type='PKD', layer='neck'),
            ssim=dict(type='SSIM', layer='neck'),
            fkd=dict(type='FKD', layer='neck'),
            maskd=dict(type='MasKD', token_steps=2, both_begin=4),
            freekd=dict(type='FreeKD', token_steps=2),
            cankd=dict(type='CanKD', layer='neck'),
            fgfi=dict(type='FGFI', head='bbox_head', loss_weight=0.01),
            frs=dict(type='FRS', feature_weight=0.005, cls_weight=0.02),
            fitnet=dict(type='FitNet', layer='neck'),
            rkd=dict(type='RKD', layer='neck', samples=16),
            sp=dict(type='SP', layer='neck', between='pixels'),
            irg=dict(type='IRG', layer='neck'),
            fsp=dict(type='FSP', layer='neck', loss_weight=1e-3),
            reviewkd=dict(type='ReviewKD', layer='neck', channels=16),
            ofd=dict(type='OFD', layer='neck', loss_weight=1e-4),
            matching=dict(type='MatchingGuided', layer='neck', interval=2, track=1, loss_weight=1e-4),
            afd=dict(type='AFD', layer='neck', channels=16),
            crd=dict(type='CRD', layer='neck', channels=16, memory=64, samples=16),
        ),
    ),
    'GFL': (
        detectors.gfl,
        detectors.gfl,
        dict(
            ld=dict(type='LD'),
            erd=dict(type='ERD'),
            bckd=dict(type='BCKD'),
            pgd=dict(type='PGD'),
            crosskd=dict(type='CrossKD', position=1),
            gid=dict(type='GID'),
            cwd=dict(type='CWD', layer='bbox_head.gfl_cls'),
        ),
    ),
    'FCOS': (detectors.fcos, detectors.fcos, dict(gid=dict(type='GID'))),
    'Faster R-CNN': (
        detectors.faster_rcnn,
        detectors.faster_rcnn,
        dict(
            mimic=dict(type='Mimic', cls_weight=1.0, bbox_weight=1.0),
            gid=dict(type='GID', head='rpn_head'),
            quantization_mimic=dict(type='QuantizationMimic'),
            chen=dict(type='Chen'),
            fgfi=dict(type='FGFI', loss_weight=0.01),
            dkd=dict(type='DKD'),
            defeat=dict(type='DeFeat'),
            gdetkd=dict(type='GDetKD', cls_weight=1.0, bbox_weight=1.0, memory=64, keys_per_step=16),
        ),
    ),
    'RetinaNet of Faster R-CNN': (
        detectors.retinanet,
        detectors.faster_rcnn,
        dict(
            gdetkd=dict(type='GDetKD', head='bbox_head', memory=64, keys_per_step=16),
            head=dict(type='HEAD', regions_per_image=32, candidates=64),
        ),
    ),
}
SEGMENTATION = {
    'PSPNet': (
        segmentors.pspnet,
        segmentors.pspnet,
        dict(
            kd=dict(type='KD'),
            wsld=dict(type='WSLD'),
            cwd=dict(
                type='CWD', layer='decode_head.bottleneck', adapter=dict(type='ConvAdapter', bias=False, norm=True)
            ),
            skd=dict(type='SKD'),
            ifvd=dict(type='IFVD'),
            cirkd=dict(
                type='CIRKD',
                pixel_contrast_size=64,
                region_contrast_size=64,
                pixel_memory_size=20,
                region_memory_size=20,
            ),
            dist=dict(type='DIST'),
            nst=dict(type='NST', layer='backbone.layer4'),
            ssim=dict(type='SSIM', layer='backbone.layer4'),
            fkd=dict(type='FKD', layer='backbone.layer4'),
            cfl=dict(type='CFL', layer='backbone.layer4'),
            mgd=dict(type='MGD', layer='backbone.layer4'),
            maskd=dict(type='MasKD', token_steps=2, both_begin=None),
            cankd=dict(type='CanKD', layer='backbone.layer4'),
            affinity=dict(type='Affinity', layer='decode_head.bottleneck'),
            at=dict(type='AT', layer=['backbone.layer3', 'backbone.layer4']),
            fitnet=dict(type='FitNet', layer='decode_head.bottleneck'),
            dkd=dict(type='DKD'),
            rkd=dict(type='RKD', layer='decode_head.bottleneck', between='pixels', samples=16),
            sp=dict(type='SP', layer='decode_head.bottleneck'),
            irg=dict(type='IRG', layer=['backbone.layer3', 'backbone.layer4'], between='pixels'),
            fsp=dict(type='FSP', layer=['backbone.layer1', 'backbone.layer2']),
            reviewkd=dict(
                type='ReviewKD', layer=['backbone.layer2', 'backbone.layer3', 'backbone.layer4'], channels=16
            ),
            ofd=dict(type='OFD', layer=['backbone.layer3', 'decode_head.bottleneck'], loss_weight=1e-6),
            matching=dict(type='MatchingGuided', layer='backbone.layer4', interval=2, track=1, loss_weight=1e-6),
            afd=dict(type='AFD', layer=['backbone.layer3', 'backbone.layer4'], channels=16),
            crd=dict(type='CRD', layer='decode_head.bottleneck', channels=16, memory=64, samples=16),
            afdcd=dict(type='AfDCD', groups=8),
            rmrkd=dict(type='RMRKD', layer='backbone.layer4'),
            bpkd=dict(type='BPKD'),
            tofd=dict(type='TOFD'),
            aicsd=dict(type='AICSD'),
            dsd=dict(type='DSD', pixel_weight=1.0),
            attnfd=dict(type='AttnFD', layer=['backbone.layer4', 'decode_head.bottleneck']),
        ),
    ),
    'SegFormer of PSPNet': (
        segmentors.segformer,
        segmentors.pspnet,
        dict(
            skd=dict(
                type='SKD',
                mode='hinge',
                feature_layer='decode_head.fusion_conv',
                teacher_feature_layer='decode_head.bottleneck',
            ),
            cwd=dict(type='CWD', layer='decode_head.conv_seg'),
        ),
    ),
    'DeepLabV3, two domains': (segmentors.deeplabv3, segmentors.deeplabv3, dict(dakd=dict(type='DAKD'))),
}
