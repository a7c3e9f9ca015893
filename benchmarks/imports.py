"""How long does the import take beside torch's own?"""

import json
import statistics
import subprocess
import sys
import time

ARMS = {
    "import torch": "import torch",
    "import fedlora_mini": "import fedlora_mini",
    "adapters, privacy, losses, models": (
        "import fedlora_mini.adapters, fedlora_mini.adapters.io, fedlora_mini.privacy, fedlora_mini.losses, "
        "fedlora_mini.models.zoo"
    ),
    "import monai.networks.nets": "import monai.networks.nets",
}


def fresh(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def measure(rounds: int = 5) -> list[dict]:
    """How long does the import take beside torch's own?"""
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for code in ARMS.values():
        fresh(code)  # writes byte code, fills the file cache
    for _ in range(rounds):
        for arm, code in ARMS.items():
            taken[arm].append(fresh(code))
    torch = taken["import torch"]
    rows = []
    for arm, own in taken.items():
        code = f"import sys\n{ARMS[arm]}\nprint('monai' in sys.modules)"
        monai = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        ratios = [a / b for a, b in zip(own, torch, strict=True)]
        rows.append(
            {
                "setting": "fresh process" + (", loads MONAI" if monai == "True" else ""),
                "arm": arm,
                "reference": "import torch",
                "ms": round(1e3 * statistics.median(own), 1),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "threads": 1,
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(measure()))
