"""Build the book: `python book/_tools/build.py [--no-strict] [--fresh] [--jobs 2]`.

First the chapters that have not been executed with this state of the package, some at a time, then the pages.
A kernel gets a fixed number of threads and sees the checkout's package. Warnings are errors.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

import executed
from notebooks import chapters
from project import BUILD, ROOT, cache_path, kernel_environment, source_hash

KEEP_CACHES = 3  # of earlier states of the package: going back to one of them costs nothing


def ensure_kernel() -> None:
    """Chapters name the kernel "python3"; it has to be this interpreter, not one found elsewhere."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
        if spec.resource_dir.startswith(sys.prefix):
            return
    except NoSuchKernel:
        pass
    subprocess.run([sys.executable, "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3"], check=True)


def prune_caches() -> None:
    """Drop the oldest execution caches."""
    cache_path().mkdir(parents=True, exist_ok=True)
    os.utime(cache_path())
    caches = sorted(cache_path().parent.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in caches[KEEP_CACHES:]:
        shutil.rmtree(old)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-strict", action="store_true", help="let warnings pass, for a draft")
    parser.add_argument("--fresh", action="store_true", help="forget earlier pages and executed chapters first")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="chapters at the same time")
    args = parser.parse_args()

    if args.fresh:
        for folder in (BUILD / "_build", cache_path()):
            shutil.rmtree(folder, ignore_errors=True)
    ensure_kernel()
    prune_caches()
    # this interpreter's Jupyter Book, whatever PATH says
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "book"]
    command += ["--config", "_config.yml", "--path-output", str(BUILD)]
    command += [] if args.no_strict else ["-W", "--keep-going"]
    env = os.environ | kernel_environment()
    print(f"package {source_hash()}, {env['OMP_NUM_THREADS']} threads", flush=True)
    began = time.perf_counter()
    try:
        executed.run_missing(args.jobs)
    except Exception as error:
        print(f"{error}\n\nFAILED: a chapter's code does not run", file=sys.stderr)
        return 1
    executed.fill(chapters())
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    print(f"\n{'Built' if code == 0 else 'FAILED'} in {time.perf_counter() - began:.1f} s")
    if code == 0:
        page = (BUILD / "_build" / "html" / "index.html").relative_to(ROOT).as_posix()
        print(f"Open {page} in a browser, or: python -m http.server -d {page.rsplit('/', 1)[0]} 8000")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
