"""Measures fmjax against what a user would pick instead; see `scripts/bench.py`.

Each side is a process of its own, controlled over a pipe (`worker.py`): `ours.py`, and `peer.py`,
the only file that imports torch. `material.py` gives both the same weights and batches, `timing.py`
lets them run in turn."""
