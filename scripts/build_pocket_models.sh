#!/usr/bin/env bash
# Trains the pocket models again from nothing and writes models/pocket-sd3, models/pocket-sd15,
# models/pocket-sdxl, models/pocket-kolors, models/pocket-clip and models/README.md (scores, times).
# The repository ships the result: nobody has to run this.
#
#   bash scripts/build_pocket_models.sh
#   bash scripts/build_pocket_models.sh --models sd15       from the pocket-sd3 that is there
#   bash scripts/build_pocket_models.sh --models sdxl       from pocket-sd3 and pocket-sd15
#   bash scripts/build_pocket_models.sh --models kolors     from pocket-sdxl
#   bash scripts/build_pocket_models.sh --models_dir /tmp/models --sd3_steps 2000
#
# On a CPU with two cores: two to three hours (models/README.md has the times).
# A run that was stopped goes on where it was; remove outputs/pocket_build to begin again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
echo "Training the pocket models; states and the log lie in outputs/pocket_build."
SECONDS=0
.venv/bin/python -m dojo.pocket.build "$@"
echo "Built in $SECONDS s."
