#!/usr/bin/env bash
# transformers reads the source of every model it has twice, behind a cache that never hits.
#
# To know which class lies in which file, transformers reads the files of all its models when it is
# imported, and does so again for its package of models when the first class is asked for
# (transformers/__init__.py and models/__init__.py both call define_import_structure). The function
# that reads a folder has an lru_cache, so one would guess that the second time costs nothing.
#
# What happens: create_import_structure_from_path (utils/import_utils.py) calls itself for each of
# some 550 folders in order, and lru_cache keeps 128. When the first folders are asked for again,
# they have been pushed out by the last ones, and so on round: not one answer comes from the cache,
# and every file is opened, read and searched twice. A training script that needs a tokenizer pays
# for all 1,669 files, in each of its processes; on a network file system that is 3,338 opened files
# a process before the first line of the script that matters. With a cache as large as the folders
# are many, the second round opens none.
#
# Exits with 1 if the cache has a hit, or files are opened once.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
venv/bin/python -W ignore - <<'PYTHON'
import sys
from collections import Counter
from functools import lru_cache

opened = Counter()


def see(event, args):
    if event == "open" and isinstance(args[0], str) and "/transformers/models/" in args[0]:
        if args[0].endswith(".py"):
            opened[args[0]] += 1


sys.addaudithook(see)
import transformers  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

first = sum(opened.values())
from transformers import AutoTokenizer  # noqa: E402, F401

second = sum(opened.values()) - first
read = import_utils.create_import_structure_from_path
known = read.cache_info()

# The same two rounds with room for all folders.
import_utils.create_import_structure_from_path = lru_cache(maxsize=None)(read.__wrapped__)
models = __import__("pathlib").Path(transformers.__file__).parent / "models"
rounds = []
for _ in range(2):
    before = sum(opened.values())
    import_utils.create_import_structure_from_path(str(models))
    rounds.append(sum(opened.values()) - before)

print("transformers", transformers.__version__)
print("files of models:", len(opened))
print("opened by `import transformers`:", first)
print("opened again by the first class that is asked for:", second)
print("the cache:", known)
print("two rounds with room for all folders:", *rounds)
changed = known.hits > 0 or second < len(opened) or rounds[0] < len(opened) or rounds[1] > 0
sys.exit(changed)
PYTHON
