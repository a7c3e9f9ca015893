"""Downloads, verifies, prepares lung nodules of four raters (a repository): lidc.py [--from PATH_OR_URL] [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.data.lidc import agreement, raters
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="packing or repository zip, a folder that holds it, or a URL")
    parser.add_argument("--size", type=int, default=64, help="side of the prepared slices in pixels (default 64)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('lidc', chosen.source, chosen.size)}")
        data = load("lidc", size=chosen.size)
    except FedloraError as error:
        sys.exit(f"error: {error}")
    _, masks, patients = raters(chosen.size)
    found = agreement(masks)
    print(f"{len(patients)} slices of {len(set(patients))} patients, four raters each")
    print(f"Dice of two raters: {found['dice'].mean():.3f}; outlines {found['distance'].nanmedian():.2f} pixels apart")
    print(f"largest area more than twice the smallest: {found['twice']:.1%} of the slices")
    print(shift_table(data).round(3).to_string())
    print(f"licence: {data.licence}")


if __name__ == "__main__":
    main()
