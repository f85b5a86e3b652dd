_base_ = 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    # as published, the student starts without ImageNet's weights; model.student.backbone.init_cfg brings them back
    student=dict(_base_.model, backbone=dict(_base_.model.backbone, init_cfg=None)),
    teacher='mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
    distillers=dict(transkd=dict(type='TransKD')))
auto_scale_lr = dict(enable=False, base_batch_size=8)
