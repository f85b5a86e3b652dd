"""Runs of training, compared: tables, charts and reports.

``runs`` trains a queue of configs; ``suites`` says what is compared, by which score; ``comparison`` puts both together for
``tools/compare.py``; ``statistics`` has the arithmetic; ``tables``, ``charts``, ``pages`` and ``report`` show the results;
``demos`` are what ``demo/run.py`` runs. They need matplotlib, jinja2, rich and tqdm.
"""
