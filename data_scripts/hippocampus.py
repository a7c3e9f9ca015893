"""Downloads, verifies, prepares the Decathlon's hippocampus (28 MB): hippocampus.py [--from PATH_OR_URL] [--size 64]"""

import argparse
import sys

from fedlora_mini.data import load, prepare, shift_table
from fedlora_mini.errors import FedloraError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help="the archive, a folder that holds it, or an http(s) URL")
    parser.add_argument("--size", type=int, default=64, help="longest side of the prepared volumes (default 64: 1 mm)")
    chosen = parser.parse_args(arguments)
    try:
        print(f"prepared: {prepare('hippocampus', chosen.source, chosen.size)}")
        data = load("hippocampus", size=chosen.size)
    except FedloraError as error:
        sys.exit(f"error: {error}")
    record = data.sites[0].record
    least, most = (" x ".join(map(str, record["native_shapes"][end])) for end in ("least", "most"))
    print(f"cases: {sum(map(len, record['cases'].values()))}")
    print(f"skipped: {'; '.join(record['skipped']) or 'none'}")
    print(f"native shapes: {least} to {most} voxels of 1 mm; label voxels lost: {record['label_voxels_lost']}")
    print(f"prepared shape: {' x '.join(map(str, data.spatial))} voxels of {record['voxel_mm']:g} mm")
    print(shift_table(data).round(3).to_string())
    print(f"licence: {data.licence}")


if __name__ == "__main__":
    main()
