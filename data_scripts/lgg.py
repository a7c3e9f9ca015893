"""Verifies and prepares the low-grade glioma slices that Kaggle gives after a login: lgg.py --from PATH [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="Kaggle's zip, the folder kaggle_3m, or lgg_flair128.npz")
    parser.add_argument("--size", type=int, default=64, help="side of the prepared slices in pixels (default 64)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('lgg', chosen.source, chosen.size)}")
        data = load("lgg", size=chosen.size)
    except FedloraError as error:
        sys.exit(f"error: {error}")
    for site in (*data.sites, *data.unseen):
        patients = len(set().union(*site.record["patients"].values()))  # EZ's one stands in two parts
        empty = sum(site.record["empty_masks"].values())
        slices = site.record["slices"]
        print(f"{site.name} {site.record['institution']}: {slices} slices of {patients} patients, {empty} empty masks")
    print(shift_table(data).round(3).to_string())
    print(f"licence: {data.licence}")


if __name__ == "__main__":
    main()
