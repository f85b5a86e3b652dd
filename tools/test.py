"""Evaluate a checkpoint, as `mmkd test` does."""

from mmkd.commands.test import main

if __name__ == '__main__':
    main()
