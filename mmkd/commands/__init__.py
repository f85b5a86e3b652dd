"""The command-line tools: each module has a ``main`` that reads ``sys.argv``; ``mmkd NAME`` and ``tools/NAME.py`` call it."""
