"""Compares the speed of fmjax with the libraries that a user would choose instead; see
`scripts/bench.py`.

Each side runs in its own process, controlled over a pipe (`worker.py`): `ours.py`, and `peer.py`,
the only file that imports torch. `material.py` gives both the same weights and batches, `timing.py`
runs them in turn."""
