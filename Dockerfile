# posttrain on an NVIDIA card. The machine needs its driver (580 or newer, for torch's wheel is one for CUDA 13) and NVIDIA's container
# toolkit; CUDA's libraries come with the wheel.
#
#   docker build -t posttrain .
#   docker run --rm --gpus all --ipc=host -v posttrain-cache:/cache -v "$PWD":/work posttrain doctor --gpu
#   docker run --rm --gpus all --ipc=host -v posttrain-cache:/cache -v "$PWD":/work posttrain sft +peft=qlora data.path=my.jsonl
#
# Build with --build-arg UID=$(id -u), so that what a run leaves in /work is yours. --ipc=host: NCCL and the data's readers share memory.
# --build-arg EXTRAS=liger,vllm: of the extras that pyproject.toml names.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

ARG EXTRAS=liger,sweep,tensorboard
ARG UID=10001

# gcc and Python's headers: Triton compiles with them (FlexAttention, liger-kernel)
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid ${UID} --create-home posttrain \
    && mkdir /cache /work /opt/posttrain /opt/venv \
    && chown posttrain /cache /work /opt/posttrain /opt/venv
USER posttrain

ENV PATH=/opt/venv/bin:$PATH \
    POSTTRAIN_CACHE=/cache/posttrain \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/posttrain
COPY --chown=posttrain pyproject.toml mkdocs.yml README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE ./
COPY --chown=posttrain src src
COPY --chown=posttrain configs configs
COPY --chown=posttrain recipes recipes
COPY --chown=posttrain docs docs
RUN python3 -m venv /opt/venv && pip install ".[${EXTRAS}]"

VOLUME /cache
WORKDIR /work
ENTRYPOINT ["posttrain"]
CMD ["--help"]
