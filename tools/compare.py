"""Compare the configs of a folder, as `mmkd compare` does."""

from mmkd.commands.compare import main

if __name__ == '__main__':
    main()
