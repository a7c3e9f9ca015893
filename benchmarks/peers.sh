#!/usr/bin/env bash
# .peers/: an environment with peft, opacus and flwr that sees the packages of the main one (torch is not downloaded twice).
# It lives apart because peft brings transformers, which slows every `import monai`, and flwr pins many packages.
# Usage: benchmarks/peers.sh [python of the main environment]      Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
main=${1:-.venv/bin/python}

if .peers/bin/python -c "import peft, opacus, flwr, fedlora_mini" 2>/dev/null; then
  echo ".peers is ready"
  exit 0
fi
torch=$("$main" -c "from importlib.metadata import version; print(version('torch'))")
[ -x .peers/bin/python ] || "$main" -m venv .peers
# Not a plain path line: the main environment's own .pth files (an editable install of this package) count too.
"$main" - <<'PY' >"$(.peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
import sysconfig
print(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
PY
# The constraint keeps the main environment's torch: pip stops rather than fetch another (perhaps CUDA) build.
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
echo "torch==$torch" >"$constraint"
.peers/bin/python -m pip install --quiet --disable-pip-version-check --retries 10 --timeout 60 \
  --constraint "$constraint" "peft==0.21.*" "opacus==1.6.*" "flwr==1.41.*"
.peers/bin/python -c "import peft, opacus, flwr, fedlora_mini
print('peft', peft.__version__, 'opacus', opacus.__version__, 'flwr', flwr.__version__)"
