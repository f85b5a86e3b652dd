# goes on from the student of mgd_retinanet_mtpd-r101.py: mmkd chain mmkd::mgd_retinanet_mtpd-r101.py mmkd::mgd_retinanet_mtpd-x101.py --go-on
_base_ = 'mgd_retinanet_mtpd-r101.py'
model = dict(teacher='mmdet::retinanet/retinanet_x101-64x4d_fpn_ms-640-800-3x_coco.py', inherit=[])
