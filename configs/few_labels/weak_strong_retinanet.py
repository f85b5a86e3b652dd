# the student sees the other images with distorted colours, and the teacher as they are
_base_ = 'pseudo_labels_retinanet.py'
model = dict(teacher=dict(view='weak'))
keep, strong = dict(type='mmkd.KeepView'), dict(type='PhotoMetricDistortion')
load, boxes, flip, _ = _base_.labelled['pipeline']
pack = dict(type='PackDetInputs', meta_keys=(*_base_.meta_keys, 'weak'))
labelled = dict(_base_.labelled, pipeline=[load, boxes, flip, keep, pack])
unlabelled = dict(
    _base_.unlabelled, pipeline=[load, dict(type='mmkd.Unlabelled'), flip, keep, strong, pack])
train_dataloader = dict(dataset=dict(datasets=[labelled, unlabelled]))
