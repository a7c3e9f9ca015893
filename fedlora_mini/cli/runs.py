"""Federated runs: `fedlora run | network | compare`."""

import argparse
import hashlib
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora_mini.cli.reports import print_stopped, report
from fedlora_mini.cli.settings import Add, add_run_settings, folder_of, parse_rates, settings
from fedlora_mini.cli.shown import print_columns, progress

RUN_EXAMPLES = """examples:
  fedlora run iat                                      the simulated phantom, four sites
  fedlora run fedit --data nuclei --rounds 15 --seed 1
  fedlora run fedsa --data my_hospitals.zip --unseen C6 --option group='^(\\d+)'
  fedlora run fedit --data phantom --option appearance=1 --option supervision=0.5
  fedlora run fedbn --model unet_bn --base none --sites 8 --fraction 0.5"""


NETWORK_EXAMPLES = """examples:
  fedlora network iat --rounds 3 --sites 2 --threads 1
  fedlora network fedit --data path/to/hospitals --threads 1 --timeout 60

Starts a SuperLink and one SuperNode per client on 127.0.0.1 and ends them at the end; needs no internet. Every message
starts a process, so a round takes 10 to 30 seconds. --execution and --eval-every have no effect: each client has its
own process and is evaluated once, at the end. Needs Flower: pip install 'fedlora_mini[flower]'"""


COMPARE_EXAMPLES = """examples:
  fedlora compare local fedit fedsa iat --data nuclei --seeds 0-2
  fedlora compare local fedit --data phantom --seeds 0-7 --search-lr 1e-3,3e-3,1e-2
  fedlora compare local fedit --data nuclei --search-lr 2e-3,5e-3,1e-2      each seed's own rate
  fedlora compare fedit iat --data path/to/hospitals --unseen C6
  fedlora compare resfim resfim:score=lottery iat_sor:form=exact,lam=0.01     rows with other numbers

An interrupted comparison goes on where it stopped when the same command is given again."""


def run_command(args: argparse.Namespace) -> None:
    """One method, one seed."""
    from fedlora_mini.experiments.config import RunConfig
    from fedlora_mini.experiments.report import leakage_table, markdown, refusals, summary
    from fedlora_mini.experiments.run import is_finished, run

    config = RunConfig(method=args.method, seed=args.seed, **settings(args))
    folder = folder_of(args.out or f"runs/{config.method}-{Path(config.data).stem}-seed{config.seed}-{config.key()}")
    stored = is_finished(folder)
    result = run(config, folder, progress(f"{config.method} seed {config.seed}", config.rounds))
    print(markdown(summary([result])))
    if len(leakage := leakage_table([result])):
        print(f"\n{markdown(leakage)}")
    for line in refusals([result]):
        print(f"refused: {line}")
    print_stopped([result])
    print(f"\nrun folder: {folder}{' (its result was there)' if stored else ''}")


def network_command(args: argparse.Namespace) -> int:
    """One method, one seed, in processes of their own that talk through Flower."""
    from fedlora_mini.errors import FedloraError
    from fedlora_mini.experiments.config import RunConfig
    from fedlora_mini.experiments.loopback import run_loopback
    from fedlora_mini.experiments.report import privacy

    if args.imports:
        raise FedloraError("--import is not for `network`: its nodes are processes of their own, without that file")
    if not 0 < args.timeout < math.inf:
        raise FedloraError(f"--timeout must be a positive and finite number of seconds, got {args.timeout:g}")
    config = RunConfig(method=args.method, seed=args.seed, **settings(args))
    folder = folder_of(
        args.out or f"runs/network-{config.method}-{Path(config.data).stem}-seed{config.seed}-{config.key()}"
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the processes then, too
    try:
        bar = progress(f"{config.method} seed {config.seed}", config.rounds)
        result = run_loopback(config, folder, bar, args.timeout)
    except KeyboardInterrupt:
        begin = "what it released stays released" if config.private else "the same command begins again"
        print(f"\nfedlora: interrupted; {begin}", file=sys.stderr)
        return 130
    own = list(result["scores"]["personal"].items())
    metrics = {"dice": "Dice", "hd95": "HD95", "accuracy": "accuracy"}
    known = [metric for metric in metrics if metric in next(iter(own))[1]]
    rows = ((name, *(f"{s[m]:.1f}" if m == "hd95" else f"{s[m]:.3f}" for m in known)) for name, s in own)
    print_columns([("site", *(metrics[m] for m in known)), *rows])
    if told := privacy([result]):
        print()
        print_columns([tuple(told), tuple(told.values())])
    print_stopped([result])
    print(f"\nserver state: sha256 {result['server_sha256']}\nrun folder: {folder}")
    return 0


def compare_command(args: argparse.Namespace) -> None:
    """Several methods, several seeds, paired differences."""
    from fedlora_mini.errors import FedloraError, unknown
    from fedlora_mini.experiments.compare import SEARCH_ON, Comparison, parse_seeds
    from fedlora_mini.experiments.config import RunConfig

    given = settings(args)
    if args.search_on not in (None, *SEARCH_ON):
        raise unknown("place to search a rate on", args.search_on, SEARCH_ON)
    if args.search_lr is not None and args.lr is not None:
        raise FedloraError("--lr and --search-lr: give the rate, or a grid for its search")
    if args.search_on is not None and args.search_lr is None:
        raise FedloraError("--search-on needs --search-lr, the grid of rates")
    on = None if args.search_on is None else SEARCH_ON[args.search_on]
    told = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
    folder = folder_of(args.out or f"runs/compare-{Path(given.get('data', 'phantom')).stem}-{told}")
    rates = [] if args.search_lr is None else parse_rates(args.search_lr, "--search-lr")
    seeds = parse_seeds(args.seeds)

    def on_run(config: RunConfig) -> Callable[[dict[str, Any]], None]:
        return progress(f"{config.method} seed {config.seed} lr {config.lr:g}", config.rounds)

    results = Comparison(args.methods, seeds, given, folder, rates, on_run, on).run()
    report(results, folder)
    print_stopped(results)


def register(add: Add) -> None:
    """Three commands, with the same settings."""
    run = add("run", run_command, "one method, one seed", RUN_EXAMPLES)
    run.add_argument("method", help="a row of `fedlora methods`")
    run.add_argument("--seed", type=int, default=0, help="draws data, start, batches and clients [0]")
    add_run_settings(run)

    network = add("network", network_command, "one method over Flower: one process per client", NETWORK_EXAMPLES)
    network.add_argument("method", help="a row of `fedlora methods`")
    network.add_argument("--seed", type=int, default=0, help="draws data, start, batches and clients [0]")
    network.add_argument("--timeout", type=float, default=600.0, metavar="S", help="wait for a node so long [600]")
    add_run_settings(network)

    compare = add("compare", compare_command, "several methods with paired seeds", COMPARE_EXAMPLES)
    compare.add_argument("methods", nargs="+", metavar="METHOD")
    compare.add_argument("--seeds", default="0-2", help="such as 0-7 or 0,3,5 [0-2]")
    compare.add_argument("--search-lr", metavar="RATES", help="a grid, the same for every method, on validation data")
    compare.add_argument(
        "--search-on",
        metavar="WHERE",
        help="own-split: a search a seed, on its own validation images; other-seed: one for all seeds, on a seed that "
        "is not reported, whose validation images on real data are partly their test images, unless --option "
        "test_seed=0 holds these out [other-seed where they are not, else own-split]",
    )
    add_run_settings(compare)
