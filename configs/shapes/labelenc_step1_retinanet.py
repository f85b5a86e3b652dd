# the first of two trainings: the encoder of labels, and a detector that follows it from a quarter of the steps on
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='LabelEncoder'),
    distillers=dict(labelenc=dict(type='LabelEnc', loss_weight=dict(type='constant', value=1.0, begin=150))))
