"""Write the plain student, as `mmkd export` does."""

from mmkd.commands.export import main

if __name__ == '__main__':
    main()
