"""Train a student, or any plain model, as `mmkd train` does."""

from mmkd.commands.train import main

if __name__ == '__main__':
    main()
