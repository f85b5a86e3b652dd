"""Runs of training, compared: tables, charts and reports.

``configs`` reads configs, and ``runs`` trains a queue of them. ``discovery`` finds out what is compared with what, and
``suites`` by which score; ``comparison`` puts them together for ``mmkd compare``. ``statistics`` has the arithmetic;
``tables``, ``charts``, ``pages`` and ``report`` show the results. ``demos`` are what ``demo/run.py`` runs.

For ``mmkd report`` ``work_dirs`` reads trainings that ended, ``boxes`` and ``label_maps`` run their models, ``pictures``
draws, and ``run_report`` puts them together. All of this needs matplotlib, jinja2, rich and tqdm.
"""
