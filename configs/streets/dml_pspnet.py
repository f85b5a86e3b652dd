# no teacher but a second student of other initial weights, which learns from the first
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(peer=dict(type='Peer', config='mmkd::streets/pspnet_student.py'), own=dict(type='Own')),
    distillers=dict(
        down=dict(type='KD', teacher='peer'),
        up=dict(type='KD', teacher='own', learner='peer')))
