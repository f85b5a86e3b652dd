"""What the methods for detectors know of mmdet: heads, assigners, boxes, regions and ground truth."""
