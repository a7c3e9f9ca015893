"""Downloads, verifies and prepares PolypGen's single frames: polypgen.py [--from PATH_OR_URL] [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="the archive, a folder with <C1..C6>/{images,masks}, or a URL")
    parser.add_argument("--size", type=int, default=64, help="side of the prepared frames in pixels (default 64)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('polypgen', chosen.source, chosen.size)}")
        data = load("polypgen", size=chosen.size)
    except FedloraError as error:
        sys.exit(f"error: {error}")
    for site in (*data.sites, *data.unseen):
        groups = sum(map(len, site.record.get("groups", {}).values()))
        how = f"{groups} groups" if groups else "three blocks"
        empty = sum(site.record["empty_masks"].values())
        print(f"{site.name} {site.record['hospital']}: {site.record['frames']} frames, {how}, {empty} empty masks")
    print(shift_table(data).round(3).to_string())
    print(f"licence: {data.licence}")


if __name__ == "__main__":
    main()
