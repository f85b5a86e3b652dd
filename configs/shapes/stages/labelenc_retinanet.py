# the second of two trainings; mmkd chain configs/shapes/labelenc_step1_retinanet.py configs/shapes/stages/labelenc_retinanet.py
_base_ = '../retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(
        type='LabelEncoder', checkpoint='work_dirs/labelenc_step1_retinanet/iter_600.pth', end=540),
    inherit=['neck', 'bbox_head'],
    distillers=dict(labelenc=dict(type='LabelEnc')))
