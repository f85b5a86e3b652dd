# has labels of a tenth of the images
_base_ = '../shapes/retinanet_student.py'
labelled = dict(indices=100, **_base_.train_dataloader['dataset'])
train_dataloader = dict(dataset=dict(indices=100))
