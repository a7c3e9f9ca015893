"""Downloads, verifies and prepares the DSB2018 nuclei (89 MB): nuclei.py [--from PATH_OR_URL] [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="the archive, a folder that holds it, or an http(s) URL")
    parser.add_argument("--size", type=int, default=64, help="side of the prepared tiles in pixels (default 64)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('nuclei', chosen.source, chosen.size)}")
        print(shift_table(load("nuclei", size=chosen.size)).round(3).to_string())
    except FedloraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
