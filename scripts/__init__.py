"""The command line: each file reads its flags and makes one call."""
