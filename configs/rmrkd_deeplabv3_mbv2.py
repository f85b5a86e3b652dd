_base_ = 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # the authors' has a third term, of logits: docs/methods/rmrkd.md
    distillers=dict(
        # the stage before the last, 96 and 1024 channels. The authors' 1.0 is of a sum over columns, of which these crops of
        # 512x1024 have 128
        rmrkd=dict(type='RMRKD', layer='backbone.layer5', teacher_layer='backbone.layer3', loss_weight=128.0),
        # 2e-5 is the authors' for crops of 512x512; the loss is a sum, so twice as strong for these
        mgd=dict(
            type='MGD',
            layer='backbone.layer7',
            teacher_layer='backbone.layer4',
            mask_ratio=0.75,
            loss_weight=2e-5)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
