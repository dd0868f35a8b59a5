"""Measures fmjax against what a user would pick instead; see `scripts/bench.py`.

Each side is a process of its own that is told over a pipe what to do (`worker.py`): `ours.py`, and `peer.py`, which alone
imports torch. `material.py` gives both the same weights and batches, `timing.py` lets them run in turn.
"""
