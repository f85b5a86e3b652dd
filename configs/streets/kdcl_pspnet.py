# no teacher but a second student of other initial weights; both learn from one target, made of the logits of both
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(peer=dict(type='Peer', config='mmkd::streets/pspnet_student.py'), own=dict(type='Own')),
    distillers=dict(
        down=dict(type='KD', teacher=['own', 'peer'], combine='min_logits', tau=2.0),
        up=dict(type='KD', teacher=['own', 'peer'], learner='peer', combine='min_logits', tau=2.0)))
