# Sourced by the llama_* scripts, with packages of their own as arguments. Makes a temporary folder, $folder, with an environment that has
# llama.cpp and what writes tiny models; $python runs in it, beside llama_c_api.py.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 "$@"
python=$folder/venv/bin/python
PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1
