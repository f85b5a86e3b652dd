"""What mmkd knows of the inside of mmengine, mmdet and mmseg; methods and the core know nothing of it."""
