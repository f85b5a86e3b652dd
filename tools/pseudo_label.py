"""Write what a model predicts as labels, as `mmkd pseudo_label` does."""

from mmkd.commands.pseudo_label import main

if __name__ == '__main__':
    main()
