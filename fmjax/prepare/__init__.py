"""Prepares a corpus: from raw text to shards of ArrayRecord.

`run` and `steps` need datatrove; `command`, which has the flags, and `report` do not.
"""
