#!/usr/bin/env bash
# Creates virtual environments of peers: benchmarks/install.sh trl|tunix|easydel|trlx [...]
#
# VENVS   folder of the environments (.venv-peers); pass the same folder to benchmarks.run as --venvs
# PYTHON  interpreter (python3.11, the newest with plain wheels of torch)
# DEVICE  cpu (default) or gpu, which installs JAX with CUDA for the peers that use JAX
#
# trlX of 2023 needs transformers 4; benchmarks/peers/trlx.py stands in for its other requirements.
# `hf`, which runs only transformers, uses the environment of trl.
set -euo pipefail
cd "$(dirname "$0")/.."

venvs=${VENVS:-.venv-peers}
python=${PYTHON:-python3.11}
device=${DEVICE:-cpu}

for peer in "$@"; do
  case $peer in
    trl|hf) peer=trl; packages=(trl==1.12.0 torch==2.13.0 transformers==5.23.0 accelerate datasets) ;;
    tunix) packages=(google-tunix==0.1.7) ;;
    easydel) packages=(easydel==0.3.0 pillow torch==2.13.0) ;;
    trlx)
      packages=(torch==2.13.0 transformers==4.46.3 accelerate==1.1.1 attrs cattrs networkx rich tabulate)
      ;;
    *) echo "error: unknown peer '$peer': trl, tunix, easydel, trlx or hf" >&2; exit 2 ;;
  esac
  if [[ $device == gpu && $peer != trl ]]; then
    packages+=("jax[cuda12]")
  fi
  echo "installing ${packages[*]} into $venvs/$peer"
  "$python" -m venv "$venvs/$peer"
  "$venvs/$peer/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  if [[ $peer == trlx ]]; then
    "$venvs/$peer/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      "trlx @ git+https://github.com/CarperAI/trlx@3340c2f3a56d1d14fdd5f13ad575121fa26b6d92"
  fi
done
