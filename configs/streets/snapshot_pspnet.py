# no teacher but the student at the end of the cycle before; the learning rate starts anew in each of three
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(before=dict(type='Snapshot', cycle=200)),
    distillers=dict(kd=dict(type='KD')))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineRestartLR',
        periods=[150, 200, 200],
        restart_weights=[1.0, 1.0, 1.0],
        eta_min=1e-5,
        by_epoch=False,
        begin=50)
]
