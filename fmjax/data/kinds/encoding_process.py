"""The process that encodes spans of records for `encoding.py`, which starts it.

It reads pickled objects from its standard input: an `Encoder`, then spans; it answers each with
what the encoder returns or raises.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    encoder = pickle.loads(pickle.load(sys.stdin.buffer))
    while True:
        try:
            span = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: object = encoder(*span)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
