# has the labels of all 1000 images
_base_ = '../shapes/retinanet_teacher.py'
