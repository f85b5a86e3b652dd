# knows the other three
_base_ = 'specialist_a_teacher.py'
metainfo = dict(classes=('triangle', 'star', 'cross'))
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
