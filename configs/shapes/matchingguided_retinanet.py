_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    distillers=dict(
        matching=dict(
            type='MatchingGuided',
            layer=[f'backbone.layer{i}' for i in (2, 3, 4)],
            interval=100,
            track=20,
            # 800 times the published one, for the smaller maps of fewer channels: the loss is a sum
            loss_weight=2e-5)))
