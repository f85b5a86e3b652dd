# the student, trained as long as an assistant and its student together
_base_ = 'pspnet_student.py'
train_cfg = dict(max_iters=1200, val_interval=1200)
