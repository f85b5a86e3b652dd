"""What the methods for segmentors know of mmseg: label maps and logits."""
