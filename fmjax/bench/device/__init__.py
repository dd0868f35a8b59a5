"""The device check: what fmjax does on this machine's GPU or TPU, in minutes.

`scripts/device_check.sh` starts it. Each part runs in a process of its own with a limit on its
time, so that neither an error nor a compilation that hangs costs more than that part.
"""

from fmjax.bench import standins

standins.install()
