_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(
        # 2e-5 is the authors' for crops of 512x512; the loss is a sum, so twice as strong for these of 512x1024
        mgd=dict(type='MGD', layer='backbone.layer4', mask_ratio=0.75, loss_weight=2e-5),
        cwd=dict(type='CWD', layer='decode_head.conv_seg', tau=4.0, loss_weight=3.0)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
