"""Downloads, verifies and prepares the retinal vessels (a repository): vessels.py [--from PATH_OR_URL] [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="packing or repository zip, a folder that holds it, or a URL")
    parser.add_argument("--size", type=int, default=64, help="side of the tiles, or of the shrunk images (default 64)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('vessels', chosen.source, chosen.size)}")
        for patch, what in ((True, "tiles (patch=True)"), (False, "whole images (patch=False)")):
            data = load("vessels", size=chosen.size, patch=patch)
            print(f"\n{what} of {chosen.size} pixels:\n{shift_table(data).round(3).to_string()}")
            for site in data.sites:
                before, after = site.record["foreground_at_256"], site.record["foreground"]
                print(f"foreground of {site.name}: {before:.2%} at 256 pixels, {after:.2%} here")
    except FedloraError as error:
        sys.exit(f"error: {error}")
    print(f"\nlicence: {data.licence}")


if __name__ == "__main__":
    main()
