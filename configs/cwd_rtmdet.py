_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    distillers=dict(
        cwd=dict(
            type='CWD',
            layer=['neck.out_convs.0.conv', 'neck.out_convs.1.conv', 'neck.out_convs.2.conv'],
            standardize=True,
            adapter=dict(type='ConvAdapter', bias=False),
            # the first 280 of 300 epochs, of 459 steps with 8 x 32 of the 117266 images with objects
            loss_weight=dict(type='constant', value=1.0, end=128520))))
auto_scale_lr = dict(base_batch_size=256)
