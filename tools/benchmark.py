"""Measure time and memory of a training step, as `mmkd benchmark` does."""

from mmkd.commands.benchmark import main

if __name__ == '__main__':
    main()
