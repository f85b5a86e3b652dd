"""Train configs one after the other, as `mmkd chain` does."""

from mmkd.commands.chain import main

if __name__ == '__main__':
    main()
