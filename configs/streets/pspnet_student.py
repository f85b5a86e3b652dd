_base_ = '_base_/pspnet.py'
model = dict(backbone=dict(base_channels=16, stem_channels=16), decode_head=dict(in_channels=128, channels=32))
