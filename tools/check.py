"""Check a distillation before it is trained, as `mmkd check` does."""

from mmkd.commands.check import main

if __name__ == '__main__':
    main()
