"""Experiments as config files: loading, overriding keys, storing them with a run, comparing them.

A config file imports `arguments` and `open_dict` from here.
"""

from fmjax.config.files import arguments, load_config, open_dict, to_dict
from fmjax.config.overrides import apply_overrides, describe_config, overridden_keys, override_texts
from fmjax.config.stored import (
    READING,
    check_resumable,
    continued,
    is_run,
    read_config,
    write_config,
)

__all__ = [
    "READING",
    "apply_overrides",
    "arguments",
    "check_resumable",
    "continued",
    "describe_config",
    "is_run",
    "load_config",
    "open_dict",
    "overridden_keys",
    "override_texts",
    "read_config",
    "to_dict",
    "write_config",
]
