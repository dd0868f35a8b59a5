"""Experiments, one a file: <model>_<task>.py."""
