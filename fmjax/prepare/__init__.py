"""Prepares a corpus: from raw text to shards of ArrayRecord.

`run` and `steps` need datatrove, `report` does not.
"""
