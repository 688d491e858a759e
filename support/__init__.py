"""What a run needs besides the method: flags, precision, memory, processes, files. No equation stands here.

A command imports it first: Ctrl-C while torch is still imported, which takes seconds, is then one line too.
"""

import sys


def _excepthook(kind, error, traceback, previous=sys.excepthook):
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130)
    previous(kind, error, traceback)


sys.excepthook = _excepthook
