_base_ = '_base_/pspnet.py'
model = dict(backbone=dict(base_channels=8, stem_channels=8), decode_head=dict(in_channels=64, channels=16))
