"""Runs every benchmark and writes results.json and README.md: `.peers/bin/python benchmarks/run.py [--threads 1]`."""

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Question(NamedTuple):
    script: str
    arm: str = ""  # the arm, or a pattern of arms, that has a target …
    target: float = 0.0  # … the ratio that it should not exceed
    note: str = ""
    column: str = ""  # the heading of the rows' notes: then one line an arm, and a column a setting
    tolerance: float = 0.03  # medians on a shared machine move by this much from run to run


QUESTIONS = (
    Question("training", "ours", 1.0),
    Question(
        "inference", "merged", 1.0, "A merged layer does one Python test more than the base; `unload` removes it."
    ),
    Question(
        "private",
        "ours",
        1.1,
        "One gradient without the optimiser's step; the private arms clip and add noise. MiB: the most that tensors "
        "hold at once. Opacus cannot hook our factors, so its arms are peft's LoRA; the second block of each "
        "setting adapts only layers that all of them know. In SwinUNETR a layer's batch is images x windows: the hooks "
        "return a row a window, so nothing there is clipped per image, and ghost clipping refuses its second step.",
    ),
    Question(
        "kernels",
        "shifted copies",
        1.1,
        "The gradients of kernels of size 3 and of what they read; *shifted copies* is what the private step takes.",
    ),
    Question(
        "fisher",
        note="pFL-ResFIM's score. An adapter's factors take one backward pass a batch, with a gradient an image; a "
        "network's own weights have the gradient of one image mapped over the batch. The last arm is smaller than the "
        "Fisher diagonal and no substitute for it: it shows what a plain pass costs.",
    ),
    Question(
        "filters",
        "low-pass alone",
        0.02,
        "The filter by itself, after the step; Laplacian and DOPPLER transform tensor after tensor.",
        tolerance=0.0,
    ),
    Question(
        "calibration",
        note="Target: *ours* at most 100 ms on an idle core. *A root finder on dp-accounting*, what this package did "
        "before, asks for the same grid of the privacy loss. Nothing is remembered between calls.",
    ),
    Question(
        "clients",
        note="Below 1 the grouped pass is faster. It saves the calls, not the arithmetic: with large batches on one "
        "core the larger activations leave the cache and the loop wins. First one step's gradients, then whole rounds "
        "of two steps, by method.",
    ),
    Question(
        "rounds",
        "round",
        1.05,
        "By LoRA of minisam, 48 px, clients one after the other; training and round are taken from the same run. The "
        "aggregation error is a diagnostic that `fedlora` writes down in every round. The last four methods compute "
        "beside their steps, and that is the method: LoRA-FAIR by gradient steps on the server (its closed form stands "
        "above), FDLoRA a search for its two weights, FedAS and pFL-ResFIM Fisher scores of the clients' images.",
        tolerance=0.0,
    ),
    Question(
        "sor",
        "* alone",
        0.05,
        "*Alone*: the penalty, its backward pass and the note of the drift, without the step that they belong to. "
        "`proxy` is what the row `iat_sor` has, `dual` what `dual_sor` has.",
        tolerance=0.0,
    ),
    Question(
        "aggregation",
        note="Clients arrive one after the other, each in memory of its own; in brackets how far the mean raises the "
        "peak of a fresh process. In one pass that is a state in float64 and one client, whatever their number. A "
        "round's aggregation error holds the factors of up to 16 clients, and the mean update of its layers.",
    ),
    Question(
        "adapters",
        note="A step is forward, backward, the companions' hooks and Adam, by the federation's own local training. "
        "Rank 4 where a row lets one choose; `sr_lora`, `sara` and `prilora` have the ranks of their rules. `houlsby`, "
        "`adaptformer`, `mo_sara` and `prompt` are no change of weights and stay beside the merged network. The last "
        "column leaves out the head, which every row trains as a dense matrix, m being the number of classes.",
        column="forms an m x n matrix in a step",
    ),
    Question("imports", note="The target is torch + 0.5 s, without MONAI."),
)


def machine(threads: int) -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {
        p: importlib.metadata.version(p) for p in ("torch", "monai", "peft", "opacus", "dp_accounting", "fedlora_mini")
    }
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def ask(question: Question, threads: int) -> dict[str, object]:
    """One script in a process of its own; its rows are the last line that it prints."""
    path = HERE / f"{question.script}.py"
    command = [sys.executable, str(path)] + ([] if question.script == "imports" else ["--threads", str(threads)])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    print(f"{question.script} …", flush=True)
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    title = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    where = measured(question, machine(threads))
    return {"question": title, "rows": json.loads(out.stdout.splitlines()[-1]), "measured": where}


def measured(question: Question, facts: dict) -> str:
    """When and where; blocks may be of different days and machines."""
    alone = facts["threads"] == 1 and question.script != "imports"  # which starts processes
    clock = "processor time" if alone else "wall-clock time"
    return f"{facts['date']}, {facts['cores']} cores ({facts['cpu']}), {facts['threads']} thread(s), {clock}"


def verdict(question: Question, rows: list[dict]) -> str:
    """The target and in how many settings it is met, the medians' own noise allowed for."""
    if not question.target:
        return question.note
    own = [row for row in rows if fnmatchcase(row["arm"], question.arm)]
    met, strictly = (sum(row["ratio"] <= question.target + spare for row in own) for spare in (question.tolerance, 0.0))
    arm, reference = question.arm.lstrip("* "), own[0]["reference"]
    text = f"Target: *{arm}* at most {question.target:.2f} x *{reference}*; met in {met} of {len(own)}"
    text += f" with a tolerance of {question.tolerance:.2f}, in {strictly} without" if question.tolerance else ""
    return f"{text}. {question.note}".strip()


def by_arm(rows: list[dict], column: str) -> list[str]:
    """One line an arm, a column a setting, and the arm's note."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        low, high = row["range"]
        ratio = f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"
        cell = f"{row['ms']:.1f} ms" if row["arm"] == row["reference"] else ratio
        cells.setdefault(row["arm"], {})[row["setting"]] = cell
    settings, notes = list(dict.fromkeys(row["setting"] for row in rows)), {row["arm"]: row["note"] for row in rows}
    lines = [f"| arm | {' | '.join(settings)} | {column} |", "|---|" + "---:|" * len(settings) + "---|"]
    for arm, own in cells.items():
        lines.append(f"| {arm} | {' | '.join(own.get(setting, 'no place') for setting in settings)} | {notes[arm]} |")
    return lines


def table(answers: dict[str, dict], facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        "Written by `.peers/bin/python benchmarks/run.py` after `make peers`; do not edit. Each ratio is taken within "
        "one round of an interleaved run (A B A B …) and is the median over rounds, with its range. "
        "Milliseconds depend on the machine and its load, ratios much less.",
        "",
        f"Python {facts['python']}, {versions}.",
    ]
    for question in QUESTIONS:
        if question.script not in answers:
            continue
        answer = answers[question.script]
        lines += ["", f"## {answer['question']}", "", verdict(question, answer["rows"]), ""]
        lines += [f"{answer['measured']}.", ""] if "measured" in answer else []
        if question.column:
            lines += by_arm(answer["rows"], question.column)
            continue
        weighed = any("mib" in row for row in answer["rows"])
        lines += [
            "| setting | arm | ms | ratio | range |" + " MiB |" * weighed,
            "|---|---|---:|---:|---|" + "---:|" * weighed,
        ]
        for row in answer["rows"]:
            low, high = row["range"]
            ratio = "1" if row["arm"] == row["reference"] else f"**{row['ratio']:.2f}**"
            spread = "" if row["arm"] == row["reference"] else f"{low:.2f} to {high:.2f}"
            cells = [row["setting"], row["arm"], f"{row['ms']:.1f}", ratio, spread]
            lines.append("| " + " | ".join(cells + ([f"{row['mib']:.0f}"] if weighed else [])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[q.script for q in QUESTIONS], help="scripts to measure again")
    options = parser.parse_args()
    results = HERE / "results.json"
    answers = json.loads(results.read_text())["answers"] if results.exists() else {}
    facts = machine(options.threads)
    for question in QUESTIONS:
        if question.script in options.only or question.script not in answers:
            answers[question.script] = ask(question, options.threads)
    results.write_text(json.dumps({"machine": facts, "answers": answers}, indent=1) + "\n")
    (HERE / "README.md").write_text(table(answers, facts))
    print(f"wrote {results.name} and README.md")


if __name__ == "__main__":
    main()
