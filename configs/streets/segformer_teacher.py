_base_ = '_base_/segformer.py'
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
train_cfg = dict(max_iters=1500, val_interval=750)
