_base_ = '_base_/fcos.py'
train_cfg = dict(max_iters=3000, val_interval=1000)
