# has learnt from labels of both domains
_base_ = '_base_/pspnet_dusk.py'
train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[_base_.day, _base_.dusk]))
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
train_cfg = dict(max_iters=1500, val_interval=750)
