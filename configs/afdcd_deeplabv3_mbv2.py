_base_ = 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(
        kd=dict(type='KD'),
        afdcd=dict(type='AfDCD', layer='backbone.layer7', teacher_layer='backbone.layer4')))
auto_scale_lr = dict(enable=False, base_batch_size=8)
