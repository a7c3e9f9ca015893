"""The command line: `fedlora methods | adapters | models | data | pretrain | run | network | compare | fewshot …`."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora_mini.errors import FedloraError

RUN_EXAMPLES = """examples:
  fedlora run iat                                      the simulated phantom, four sites
  fedlora run fedit --data nuclei --rounds 15 --seed 1
  fedlora run fedsa --data my_hospitals.zip --unseen C6 --option group='^(\\d+)'
  fedlora run fedit --data phantom --option appearance=1 --option supervision=0.5
  fedlora run fedbn --model unet --base none --sites 8 --fraction 0.5"""

NETWORK_EXAMPLES = """examples:
  fedlora network iat --rounds 3 --sites 2 --threads 1
  fedlora network fedit --data path/to/hospitals --threads 1 --timeout 60

Starts a SuperLink and one SuperNode per client on 127.0.0.1 and ends them at the end; needs no internet. Every message
starts a process, so a round takes 10 to 30 seconds. --execution and --eval-every have no effect: each client has its
own process and is evaluated once, at the end. Needs Flower: pip install 'fedlora_mini[flower]'"""

COMPARE_EXAMPLES = """examples:
  fedlora compare local fedit fedsa iat --data nuclei --seeds 0-2
  fedlora compare local fedit --data phantom --seeds 0-7 --search-lr 1e-3,3e-3,1e-2
  fedlora compare fedit iat --data path/to/hospitals --unseen C6
  fedlora compare resfim resfim:score=lottery iat_sor:form=exact,lam=0.01     rows with other numbers

An interrupted comparison goes on where it stopped when the same command is given again."""

FEWSHOT_EXAMPLES = """examples:
  fedlora fewshot --list                                     tasks and arms
  fedlora fewshot lora-4 arena-8 full --shots 5 --splits 0-2 the phantom's vessel, one rate for all
  fedlora fewshot --tasks nuclei-he,nuclei-fluo520 --shots 5,10 --splits 0-4 --search-lr 1e-3,3e-3,1e-2
  fedlora fewshot arena-8 --change lam=0.01 --splits 0-7     another weight of ARENA's l1 norm

Without arms: all of them. No validation data: training stops by its own loss, and --search-lr chooses each arm's rate
on a task that is not reported. An interrupted study goes on where it stopped when the same command is given again."""


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    from fedlora_mini.experiments.arms import value

    out = {}
    for pair in pairs:
        name, found, given = pair.partition("=")
        if not found:
            raise FedloraError(f"--option '{pair}' is not understood; accepted: NAME=VALUE")
        out[name.replace("-", "_")] = value(given)
    return out


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The `RunConfig` settings among the parsed arguments; what was not given keeps its default."""
    names = (
        "data sites unseen size dirichlet clients model base rank alpha rounds steps batch lr optimiser weight_decay "
        "fraction execution device precision threads eval_every passes epsilon unit sigma delta accountant clip "
        "clipping quantile"
    )
    given = {name: getattr(args, name) for name in names.split() if getattr(args, name, None) is not None}
    if args.ranks:
        given["ranks"] = [int(rank) for rank in args.ranks.split(",")]
    given |= {"data_options": _options(args.option), "change": _options(args.change), "leakage": args.leakage}
    given["secure"] = args.secure
    return given | {"augment": not args.no_augment}


def _progress(title: str, rounds: int) -> Callable[[dict[str, Any]], None]:
    """A bar on standard error with the current loss and validation Dice."""
    from tqdm import tqdm

    bars: list[Any] = []  # begun with the first round, so that an error before it stands alone
    shown: dict[str, str] = {}

    def step(record: dict[str, Any]) -> None:
        """Show one finished round."""
        if not bars:
            bars.append(tqdm(total=rounds, desc=title, unit="round", dynamic_ncols=True, disable=None))
        bar = bars[0]
        for line in record["refused"]:
            bar.write(f"round {record['round']}: refused {line}", file=sys.stderr)
        if record["loss"] is not None:
            shown["loss"] = f"{record['loss']:.3f}"
        for name, what in (("val_dice", "Dice"), ("val_accuracy", "accuracy")):
            if name in record:
                shown[what] = f"{record[name]:.3f}"
        bar.n = record["round"]
        bar.set_postfix(shown)
        if record["round"] == rounds:
            bar.close()

    return step


def methods_command(args: argparse.Namespace) -> None:
    """Print the method table, from a tiny run of every row."""
    from tqdm import tqdm

    from fedlora_mini.experiments.table import table
    from fedlora_mini.federation.methods import METHODS, method

    names = args.names or list(METHODS)
    for name in names:
        method(name)
    checked = list(tqdm(table(names, args.model), "running", len(names), leave=False, unit="row", disable=None))
    if args.check:
        for each in checked:
            print(f"{each.row.name:<16} {'; '.join(each.problems) or 'as it says'}")
        if bad := [each.row.name for each in checked if each.problems]:
            raise FedloraError(f"{len(bad)} rows do not do what they say: {', '.join(bad)}")
        return
    rows = [("name", "method", "trained", "sent", "kept", "server", "up", "down", "beside")]
    for row in (each.row for each in checked):
        size = (f"{row.bytes_up:,}", f"{row.bytes_down:,}")
        rows.append((row.name, row.title, row.trained, row.sent, row.kept, row.server, *size, row.beside))
    _print_columns(rows)
    print(f"up, down: bytes of one client in the second round, {args.model}, rank 4 where there is one.")


def adapters_command(args: argparse.Namespace) -> None:
    """Print what can be trained."""
    from fedlora_mini.adapters.registry import ADAPTERS
    from fedlora_mini.regularizers.companions import COMPANIONS

    rows = [("name", "what trains besides the head", "options", "training")]
    for name, recipe in ADAPTERS.items():
        training = COMPANIONS[name].__doc__ or "" if name in COMPANIONS else ""
        rows.append((name, recipe.summary, ", ".join(sorted(recipe.options)) or "-", training.partition(";")[0] or "-"))
    _print_columns(rows)


def models_command(args: argparse.Namespace) -> None:
    """Print the networks."""
    from fedlora_mini.models.zoo import CLASSIFIERS, MODELS

    rows = [("name", "dims", "sides", "what")]
    for name, entry in (MODELS | CLASSIFIERS).items():
        rows.append((name, f"{entry.dims}D", f"multiples of {entry.multiple}, >= {entry.smallest}", entry.summary))
    _print_columns(rows)


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def data_command(args: argparse.Namespace) -> int:
    """list, fetch, prepare, show, check."""
    from fedlora_mini import data

    if args.action == "list":
        rows = [tuple(row) for row in (map(str, r.values()) for r in data.available())]
        _print_columns([tuple(data.available()[0]), *rows])
        return 0
    if not args.name:
        raise FedloraError(f"fedlora data {args.action} needs a name or a path; see `fedlora data list`")
    if args.action == "fetch":
        print(data.fetch(args.name, args.source))
    elif args.action == "prepare":
        print(data.prepare(args.name, args.source, args.size))
    elif args.action == "check":
        report = data.check(args.name)
        print(report)
        return 1 if report.problems else 0
    else:
        loaded = data.load(args.name, size=args.size, seed=args.seed, **_options(args.option))
        print(data.shift_table(loaded).to_string(float_format=lambda v: f"{v:.3f}"))
        out = Path(args.out or f"{loaded.name}-gallery.png")
        data.gallery(loaded).savefig(out, dpi=130)
        print(f"{loaded.note}\nlicence: {loaded.licence}\ngallery: {out}")
    return 0


def run_command(args: argparse.Namespace) -> None:
    """One method, one seed."""
    from fedlora_mini.experiments.config import RunConfig
    from fedlora_mini.experiments.report import markdown, summary
    from fedlora_mini.experiments.run import run

    config = RunConfig(method=args.method, seed=args.seed, **_settings(args))
    folder = Path(args.out or f"runs/{config.method}-{Path(config.data).stem}-seed{config.seed}-{config.key()}")
    result = run(config, folder, _progress(f"{config.method} seed {config.seed}", config.rounds))
    print(markdown(summary([result])))
    print(f"\nrun folder: {folder}")


def network_command(args: argparse.Namespace) -> int:
    """One method, one seed, in processes of their own that talk through Flower."""
    from fedlora_mini.experiments.config import RunConfig
    from fedlora_mini.experiments.loopback import run_loopback
    from fedlora_mini.experiments.report import privacy

    config = RunConfig(method=args.method, seed=args.seed, **_settings(args))
    folder = Path(args.out or f"runs/network-{config.method}-{Path(config.data).stem}-seed{config.seed}-{config.key()}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the processes then, too
    try:
        bar = _progress(f"{config.method} seed {config.seed}", config.rounds)
        result = run_loopback(config, folder, bar, args.timeout)
    except KeyboardInterrupt:
        print("\nfedlora: interrupted; the same command begins again", file=sys.stderr)
        return 130
    own = list(result["scores"]["personal"].items())
    metrics = {"dice": "Dice", "hd95": "HD95", "accuracy": "accuracy"}
    known = [metric for metric in metrics if metric in next(iter(own))[1]]
    rows = ((name, *(f"{s[m]:.1f}" if m == "hd95" else f"{s[m]:.3f}" for m in known)) for name, s in own)
    _print_columns([("site", *(metrics[m] for m in known)), *rows])
    if told := privacy([result]):
        print()
        _print_columns([tuple(told), tuple(told.values())])
    print(f"\nserver state: sha256 {result['server_sha256']}\nrun folder: {folder}")
    return 0


def compare_command(args: argparse.Namespace) -> None:
    """Several methods, several seeds, paired differences."""
    from fedlora_mini.experiments.compare import Comparison, parse_seeds
    from fedlora_mini.experiments.config import RunConfig

    settings = _settings(args)
    name = f"runs/compare-{Path(settings.get('data', 'phantom')).stem}-{RunConfig(**settings).key()}"
    folder = Path(args.out or name)
    rates = [float(rate) for rate in args.search_lr.split(",")] if args.search_lr else []
    seeds = parse_seeds(args.seeds)

    def on_run(config: RunConfig) -> Callable[[dict[str, Any]], None]:
        return _progress(f"{config.method} seed {config.seed} lr {config.lr:g}", config.rounds)

    _report(Comparison(args.methods, seeds, settings, folder, rates, on_run).run(), folder)


def fewshot_command(args: argparse.Namespace) -> None:
    """A new structure from a few images: arms x shots x splits."""
    from tqdm import tqdm

    from fedlora_mini.experiments.compare import parse_seeds
    from fedlora_mini.experiments.fewshot import ARMS, TASKS, Study
    from fedlora_mini.experiments.fewshot.report import write_report

    if args.list:
        _print_columns([("task", "what"), *((name, row.summary) for name, row in TASKS.items())])
        print()
        _print_columns([("arm", "title", "adapter"), *((name, row.title, row.adapter) for name, row in ARMS.items())])
        return
    tasks, arms, shots = args.tasks.split(","), args.arms or list(ARMS), parse_seeds(args.shots)
    splits, folder = parse_seeds(args.splits), Path(args.out or f"runs/fewshot-{args.tasks.replace(',', '-')}")
    rates = [float(rate) for rate in (args.search_lr or str(args.lr)).split(",")]
    settings = {"steps": args.steps, "batch": args.batch, "patience": args.patience, "threads": args.threads}
    settings |= {"changes": tuple(_options(args.change).items())}
    searched = parse_seeds(args.search_splits)
    looked = len(arms) * len(rates) * len(searched) * (len(rates) > 1)
    bar = tqdm(total=len(tasks) * len(arms) * len(shots) * len(splits) + looked, unit="run", disable=None)

    def on_run(record: dict[str, Any]) -> None:
        bar.update()
        own = record["config"]
        bar.set_postfix_str(f"{own['task']} {own['arm']} {own['shots']} shots: Dice {record['dice']:.3f}")

    study = Study(tasks, arms, shots, splits, folder, rates, settings, on_run, searched)
    results = study.run()
    bar.close()
    text, pictures = write_report(results, folder)
    print(text.read_text(encoding="utf-8"))
    print(f"tables: {text}\npictures: {', '.join(map(str, pictures))}")


def private_command_of(args: argparse.Namespace) -> None:
    """Who moves which factor when, with which filter, under one budget."""
    from fedlora_mini.experiments.private_command import act

    act(args, _progress)


def audit_command(args: argparse.Namespace) -> int:
    """Whether the private mechanism keeps what it claims, beside three that do not."""
    from fedlora_mini.experiments.audit import report

    found = report(args.epsilon, args.delta, args.q, args.steps, args.games, args.canaries, seed=args.seed)
    rows = [("mechanism", "claimed", "releases", "many runs", "same, Gaussian", "one run", "caught")]
    for row in found:
        bounds = ("-" if row[k] is None else f"{row[k]:.2f}" for k in ("many runs", "many runs, Gaussian", "one run"))
        rows.append(
            (row["mechanism"], f"{row['claimed']:g}", f"{row['releases']}", *bounds, str(row["caught"]).lower())
        )
    _print_columns(rows)
    print("lower bounds on epsilon; those of a row hold together with 95 % confidence. Chapter 19")
    return int(found[0]["caught"])


def report_command(args: argparse.Namespace) -> None:
    """Tables and a figure of finished runs."""
    from fedlora_mini.experiments.report import read_results

    _report(read_results([Path(run) for run in args.runs]), Path(args.out))


def _report(results: list[dict[str, Any]], folder: Path) -> None:
    from fedlora_mini.experiments.report import write_report

    text, picture = write_report(results, folder)
    print(text.read_text(encoding="utf-8"))
    print(f"tables: {text}\nfigure: {picture}")


def pretrain_command(args: argparse.Namespace) -> None:
    """Make the frozen base."""
    import torch
    from tqdm import tqdm

    from fedlora_mini.experiments.pretrain import Pretraining, pretrain

    given = {n: getattr(args, n) for n in ("model", "size", "steps", "batch", "seed") if getattr(args, n) is not None}
    config = Pretraining(**given)
    torch.set_num_threads(args.threads)
    with tqdm(
        total=config.steps, desc=f"pre-training {config.model}", unit="step", dynamic_ncols=True, disable=None
    ) as bar:

        def progress(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        print(pretrain(config, Path(args.out), progress))


def _add_run_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", help="a data set (see `fedlora data list`) or the path of your own folder or zip [phantom]")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the data set; repeatable")
    add("--sites", help="how many sites, or their names, comma-separated")
    add("--unseen", help="sites that never train, comma-separated")
    add("--size", type=int, help="image side in pixels [64]")
    add("--dirichlet", type=float, metavar="ALPHA", help="deal the images anew, Dirichlet(ALPHA) over their origin")
    add("--clients", type=int, help="with --dirichlet: to so many clients")
    add("--model", help="a network (see `fedlora models`) [minisam]")
    add("--base", help="auto, none, meshnet-brain, imagenet, or a file of `fedlora pretrain` [auto]")
    add("--rank", type=int, help="rank r of the adapters [4]")
    add("--ranks", help="ranks by client in a circle, such as 2,4,8, for methods that take unequal ones")
    add("--alpha", type=float, help="scale s = alpha / r [alpha = r]")
    add("--rounds", type=int, help="rounds of communication [10]")
    add("--steps", type=int, help="local steps a round [10]")
    add("--passes", type=float, help="local steps by the client's own data: so many times through it")
    add("--batch", type=int, help="images a step [8]")
    add("--lr", type=float, help="learning rate [the adapter's: lora 5e-3, full 1e-3]")
    add("--optimiser", help="adam or sgd [adam]")
    add("--weight-decay", type=float, help="decoupled weight decay [0]")
    add("--no-augment", action="store_true", help="no mirrored images")
    add("--fraction", type=float, help="share of the clients in a round [1]")
    add("--execution", help="auto, sequential, or grouped: all clients in one pass [auto: where it pays]")
    add("--device", help="auto, cpu or cuda [auto]")
    add("--precision", help="auto, float32 or bf16 [auto: bf16 on CUDA]")
    add("--change", action="append", default=[], metavar="NAME=VALUE", help="another number in the method's row")
    add("--leakage", action="store_true", help="measure in every round what shared factors tell of the sites")
    add("--epsilon", type=float, help="privacy budget: what may be spent on any one image, or client [no privacy]")
    add("--unit", help="what is protected: image or client [image]")
    add("--sigma", type=float, help="noise multiplier [with --epsilon: the least that the accountant allows]")
    add("--delta", type=float, help="of the privacy budget [1e-5]")
    add("--accountant", help="pld (tight), rdp, gdp or zcdp [pld]")
    add("--clip", type=float, metavar="C", help="largest norm of one image's gradient, or client's change [1]")
    add("--quantile", type=float, help="with --unit client: C follows this quantile of the norms [C stays]")
    add("--clipping", help="flat, per-layer or normalised [flat]")
    add("--secure", action="store_true", help="noise from the operating system: a run cannot be repeated")
    add("--threads", type=int, help="CPU threads [torch's choice]")
    add("--eval-every", type=int, default=2, metavar="N", help="validation Dice every N rounds, 0 = never [2]")
    add("--out", metavar="FOLDER", help="where to write [runs/…]")


def parser() -> argparse.ArgumentParser:
    """All commands and their help."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("fedlora", description="Federated low-rank adaptation for medical segmentation.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, act: Callable[[argparse.Namespace], int | None], text: str, epilog: str = "") -> Any:
        made = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
        made.set_defaults(act=act)
        return made

    methods = add("methods", methods_command, "the table of methods, with what each trains, sends and keeps")
    methods.add_argument("names", nargs="*", metavar="METHOD", help="only these rows")
    methods.add_argument("--check", action="store_true", help="say whether a tiny run did what each row says")
    methods.add_argument("--model", default="minisam", help="the network of the tiny run [minisam]")
    add("adapters", adapters_command, "what can be trained in a network")
    add("models", models_command, "the networks that adapters attach to")

    data = add(
        "data", data_command, "list, fetch, prepare, show or check data", "example: fedlora data check hospitals/"
    )
    data.add_argument("action", choices=["list", "fetch", "prepare", "show", "check"])
    data.add_argument("name", nargs="?", help="a data set or a path")
    data.add_argument("--from", dest="source", metavar="PATH_OR_URL", help="take the archive from here")
    data.add_argument("--size", type=int, default=64)
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    data.add_argument("--out", metavar="PNG", help="show: where the gallery goes")

    run = add("run", run_command, "one method, one seed", RUN_EXAMPLES)
    run.add_argument("method", help="a row of `fedlora methods`")
    run.add_argument("--seed", type=int, default=0)
    _add_run_settings(run)

    network = add("network", network_command, "one method over Flower: one process per client", NETWORK_EXAMPLES)
    network.add_argument("method", help="a row of `fedlora methods`")
    network.add_argument("--seed", type=int, default=0)
    network.add_argument("--timeout", type=float, default=600.0, metavar="S", help="wait for a node so long [600]")
    _add_run_settings(network)

    compare = add("compare", compare_command, "several methods with paired seeds", COMPARE_EXAMPLES)
    compare.add_argument("methods", nargs="+", metavar="METHOD")
    compare.add_argument("--seeds", default="0-2", help="such as 0-7 or 0,3,5 [0-2]")
    compare.add_argument("--search-lr", metavar="RATES", help="a grid, the same for every method, on validation data")
    _add_run_settings(compare)

    few = add("fewshot", fewshot_command, "a new structure from 1 to 10 images", FEWSHOT_EXAMPLES)
    few.add_argument("arms", nargs="*", metavar="ARM", help="rows of `fedlora fewshot --list` [all]")
    few.add_argument("--list", action="store_true", help="print tasks and arms")
    few.add_argument("--tasks", default="vessel", help="comma-separated [vessel]")
    few.add_argument("--shots", default="1,2,5,10", help="labelled images, such as 5 or 1,2,5,10 [1,2,5,10]")
    few.add_argument("--splits", default="0-2", help="such as 0-7: other labelled images and test images [0-2]")
    few.add_argument("--search-lr", metavar="RATES", help="a grid, the same for every arm, on the tuning task")
    few.add_argument("--search-splits", default="1000-1002", help="splits of the tuning task [1000-1002]")
    few.add_argument("--lr", type=float, default=5e-3, help="one rate for all arms, without --search-lr [5e-3]")
    few.add_argument("--steps", type=int, default=120, help="at most so many steps [120]")
    few.add_argument("--batch", type=int, default=4)
    few.add_argument("--patience", type=int, default=40, help="steps without a fall of the loss that end training [40]")
    few.add_argument("--change", action="append", default=[], metavar="NAME=VALUE", help="an option of the regulariser")
    few.add_argument("--threads", type=int, default=1)
    few.add_argument("--out", metavar="FOLDER", help="where to write [runs/fewshot-…]")

    from fedlora_mini.experiments import private_command

    private = add(
        "private", private_command_of, "private adaptation: arms by filter at one epsilon", private_command.EXAMPLES
    )
    private_command.add_arguments(private)

    audit = add("audit", audit_command, "attacks on the private mechanism: does it keep its epsilon?")
    audit.add_argument("--epsilon", type=float, default=3.0, help="what it claims [3]")
    audit.add_argument("--delta", type=float, default=1e-5)
    audit.add_argument("--q", type=float, default=1.0, help="sampling rate [1]")
    audit.add_argument("--steps", type=int, default=4, help="releases [4]")
    audit.add_argument("--games", type=int, default=4000, help="runs with one canary or none [4000]")
    audit.add_argument("--canaries", type=int, default=1000, help="canaries of the one run [1000]")
    audit.add_argument("--seed", type=int, default=0)

    report = add(
        "report", report_command, "tables and a figure of finished runs", "example: fedlora report results/a.jsonl"
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders, comparison folders or .jsonl files")
    report.add_argument("--out", default=".", metavar="FOLDER", help="where report.md and report.png go [here]")

    base = add("pretrain", pretrain_command, "make the pre-trained base from a seed, in minutes on a CPU")
    base.add_argument("--model")
    for name in ("size", "steps", "batch", "seed"):
        base.add_argument(f"--{name}", type=int)
    base.add_argument("--threads", type=int, default=1, help="the bytes depend on it [1]")
    base.add_argument("--out", default="base.safetensors", metavar="FILE")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if `data check` found problems; 2 for bad input, told in one line; 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        return args.act(args) or 0
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfedlora: interrupted; the same command goes on from the last finished round", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
