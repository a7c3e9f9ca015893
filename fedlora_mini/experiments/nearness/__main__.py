"""Makes the records that a file lacks, one a data set, network and split; the real sets have to be there.

python -m fedlora_mini.experiments.nearness results/nearness.jsonl
"""

from fedlora_mini.experiments.lines import records_file
from fedlora_mini.experiments.nearness import study

if __name__ == "__main__":
    study(records_file(), progress=lambda record: print(record["case"], record["config"]["model"], flush=True))
