# the second of two trainings, after labelenc_step1_retinanet.py; without the distance at the end, as the authors have it
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(
        type='LabelEncoder', checkpoint='work_dirs/labelenc_step1_retinanet/epoch_16.pth', end=80000),
    inherit=['neck', 'bbox_head'],
    distillers=dict(labelenc=dict(type='LabelEnc')))
