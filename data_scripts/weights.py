"""Downloads and verifies MeshNet's weights (380 KB) for the base "meshnet-brain": weights.py [--from FOLDER_OR_URL]"""

import argparse
import sys

from fedlora_mini.errors import FedloraError
from fedlora_mini.models import meshnet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", help=f"folder with {', '.join(meshnet.FILES)}, or its http(s) address")
    chosen = parser.parse_args(arguments)
    try:
        print(f"verified: {meshnet.fetch(chosen.source)}")
        tensors, notes = meshnet.read_weights()
    except FedloraError as error:
        sys.exit(f"error: {error}")
    print(f"parameters: {sum(value.numel() for value in tensors.values()):,}")
    print(f"classes: {', '.join(notes['classes'])}")
    print(f"licence: {notes['licence']}")


if __name__ == "__main__":
    main()
