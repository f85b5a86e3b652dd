# the second of two trainings, after labelenc_step1_fcos.py; without the distance at the end, as the authors have it
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(
        type='LabelEncoder', checkpoint='work_dirs/labelenc_step1_fcos/epoch_16.pth', end=80000),
    inherit=['neck', 'bbox_head'],
    distillers=dict(labelenc=dict(type='LabelEnc')))
