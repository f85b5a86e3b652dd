# knows three of the six shapes; the student of erd_gfl.py starts from it and learns the others
_base_ = 'gfl_student.py'
metainfo = dict(classes=('circle', 'square', 'ring'))
model = dict(bbox_head=dict(num_classes=3))
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
train_cfg = dict(max_iters=1500, val_interval=500)
