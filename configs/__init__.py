"""Experiments, one per file: <model>_<task>.py."""
