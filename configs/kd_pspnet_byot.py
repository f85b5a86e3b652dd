# no teacher: the decode head teaches the auxiliary head, and the last stage of the backbone the one before it
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(own=dict(type='Own')),
    distillers=dict(
        kd=dict(
            type='KD', layer='auxiliary_head.conv_seg', teacher_layer='decode_head.conv_seg', tau=3.0, loss_weight=0.3),
        at=dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4', loss_weight=60.0)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
