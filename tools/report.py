"""Report on a training that ended, as `mmkd report` does."""

from mmkd.commands.report import main

if __name__ == '__main__':
    main()
