#!/usr/bin/env bash
# Makes the virtual environment of a peer: benchmarks/install.sh trl|tunix|easydel [trl|tunix|easydel ...]
#
# VENVS   folder they go to (.venv-peers); benchmarks.run wants the same as --venvs
# PYTHON  interpreter they are made with (python3.11); torch's plain wheels end at it
# DEVICE  cpu (default) or gpu: JAX with CUDA for the peers that use it
#
# `hf`, transformers alone, runs in the environment of trl.
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
    *) echo "error: unknown peer '$peer': trl, tunix, easydel or hf" >&2; exit 2 ;;
  esac
  if [[ $device == gpu && $peer != trl ]]; then
    packages+=("jax[cuda12]")
  fi
  echo "installing ${packages[*]} into $venvs/$peer"
  "$python" -m venv "$venvs/$peer"
  "$venvs/$peer/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
done
