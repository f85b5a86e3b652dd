_base_ = 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::segformer/segformer_mit-b4_8xb1-160k_cityscapes-1024x1024.py',
    # logits alone: CIRKD's script for SegFormer has features, KD and a critic besides
    distillers=dict(cwd=dict(type='CWD', layer='decode_head.conv_seg', tau=4.0, loss_weight=0.3)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
