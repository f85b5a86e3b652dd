_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    # Summed over 64 channels instead of 256 and 12 logits instead of 720, and for 600 iterations instead of 24 epochs.
    distillers=dict(
        frs=dict(
            type='FRS',
            feature_weight=dict(type='linear', value=0.02, end=50),
            cls_weight=dict(type='linear', value=0.1, end=50))))
