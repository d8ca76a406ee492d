"""The `pressd` command with the scripted engine in its server."""

import sys

from pressd.server.cli import main

if __name__ == "__main__":
    sys.exit(main(engine="scripted_engine:create"))
