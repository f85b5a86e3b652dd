"""Runs of training, compared: tables, charts and reports."""
