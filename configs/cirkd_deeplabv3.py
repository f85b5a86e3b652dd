_base_ = 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(
        kd=dict(type='KD'),
        # the authors' memory has 20000 pixels of each class, 700 MB more in each checkpoint, and they do not pool
        cirkd=dict(type='CIRKD')))
auto_scale_lr = dict(enable=False, base_batch_size=8)
