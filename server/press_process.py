"""`pressd compress` in a process that `serve -s` starts: the memory that pressing takes goes with it."""

import os
import signal
import sys
import threading

from pressd.server import cli


def main(arguments: list[str]) -> int:
    """Press as `pressd compress` does with these arguments, until the parent goes."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group, but the parent decides when pressing ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    return cli.main(["compress", *arguments])


def _die_with_the_parent() -> None:
    """The parent holds the other end of standard input; it closes when the parent is gone, however it went."""
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
