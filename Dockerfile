# SD Dojo for NVIDIA's GPUs: the repository with its environment, run by a user who is not root.
#
#   docker build -t sd-dojo .
#   docker run --rm -it --gpus all --ipc host \
#       -v "$PWD/models:/home/ubuntu/sd-dojo/models" -v "$PWD/datas:/home/ubuntu/sd-dojo/datas" \
#       -v "$PWD/outputs:/home/ubuntu/sd-dojo/outputs" sd-dojo
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# g++, with gcc, and Python's headers are what --torch_compile compiles with: gcc for Triton on a
# GPU, g++ on a CPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has this user, number 1000: the owner of mounted folders on most machines.
RUN install --directory --owner=ubuntu --group=ubuntu /home/ubuntu/sd-dojo
USER ubuntu
WORKDIR /home/ubuntu/sd-dojo

# First what the environment hangs on, so that it is made again only when that changes.
COPY --chown=ubuntu:ubuntu requirements.txt setup.py pyproject.toml MANIFEST.in ./
COPY --chown=ubuntu:ubuntu scripts/setup.sh scripts/setup.sh
COPY --chown=ubuntu:ubuntu src/dojo/__init__.py src/dojo/__init__.py
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh --cuda

COPY --chown=ubuntu:ubuntu . .
ENV PATH="/home/ubuntu/sd-dojo/.venv/bin:$PATH"
CMD ["bash"]
