_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # both fade, as the paper's adaptive weight has it
    distillers=dict(
        kd=dict(type='KD', loss_weight=dict(type='linear', start=1.0, value=0.0, end=80000)),
        aicsd=dict(type='AICSD', loss_weight=dict(type='linear', start=10.0, value=0.0, end=80000))))
auto_scale_lr = dict(enable=False, base_batch_size=8)
