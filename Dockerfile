# syntax=docker/dockerfile:1
# The server as an image. Targets: `cpu` (the default), `cuda`, and `vllm` for the engine of several
# GPUs. docs/operations.md has the commands, docs/scaling.md says when to take which.
#
#   docker build --build-arg TORCH_INDEX_URL=<PyTorch's CPU index> --tag reft-serve .
#   docker build --target cuda --tag reft-serve:cuda .
#   docker build --target vllm --tag reft-serve:vllm .
#
# deploy/docker/rehearse performs these steps without Docker; it knows the instructions used here.

ARG BASE_IMAGE=debian:bookworm-slim

# What every stage stands on: Python, an init for PID 1, and the account that the server runs under.
FROM ${BASE_IMAGE} AS base
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --system --gid 10001 reft \
    && useradd --system --uid 10001 --gid reft --home-dir /var/cache/reft-serve --no-create-home \
        --shell /usr/sbin/nologin reft \
    && install --directory --owner=reft --group=reft --mode=0700 \
        /var/lib/reft-serve /var/cache/reft-serve

# pip lives here and installs into /opt/reft, which gets no pip of its own.
FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/reft
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# What the dependencies are read from, and nothing that changes more often.
COPY pyproject.toml LICENSE deploy/docker/constraints.txt ./
COPY reft_core/__init__.py reft_core/

# PyTorch has a layer of its own: it is most of the image and changes least.
FROM build AS torch-cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL
RUN case "${TORCH_INDEX_URL:?name the CPU index that the install page of PyTorch names, or default for that of pip}" in \
        default) set -- ;; \
        *) set -- --index-url "$TORCH_INDEX_URL" ;; \
    esac \
    && /opt/build/bin/pip --python /opt/reft/bin/python install "$@" "torch==$TORCH_VERSION"

FROM build AS torch-cuda
ARG TORCH_VERSION=2.13.0
RUN /opt/build/bin/pip --python /opt/reft/bin/python install "torch==$TORCH_VERSION"

# The project is installed empty, for its dependencies, and taken out again.
FROM torch-cpu AS dependencies-cpu
ARG EXTRAS=structured,postgres,s3,otel
RUN touch README.md \
    && /opt/build/bin/pip --python /opt/reft/bin/python install --constraint constraints.txt ".[$EXTRAS]" \
    && /opt/build/bin/pip --python /opt/reft/bin/python uninstall --yes reft-serve

FROM torch-cuda AS dependencies-cuda
ARG EXTRAS=structured,postgres,s3,otel
RUN touch README.md \
    && /opt/build/bin/pip --python /opt/reft/bin/python install --constraint constraints.txt ".[$EXTRAS]" \
    && /opt/build/bin/pip --python /opt/reft/bin/python uninstall --yes reft-serve

# vLLM chooses PyTorch, and the versions of much else: the constraints are not for it.
FROM build AS dependencies-vllm
ARG EXTRAS=vllm,postgres,s3,otel
# Ray is what joins the GPUs of several machines; empty for those of one. 2.52 is the first with tokens.
ARG RAY="ray[cgraph]>=2.52"
RUN touch README.md \
    && /opt/build/bin/pip --python /opt/reft/bin/python install ".[$EXTRAS]" ${RAY:+"$RAY"} \
    && /opt/build/bin/pip --python /opt/reft/bin/python uninstall --yes reft-serve

# Our own code, apart from the environment, so that a change of it is a layer of a few megabytes.
FROM build AS source
COPY README.md ./
COPY reft_core reft_core
COPY server server
COPY trainer trainer
RUN /opt/build/bin/pip --python /opt/reft/bin/python install --no-deps --target /opt/app .

FROM base AS runtime
# The kernels of a CPU are compiled on first use, for the processor they run on (g++). Triton compiles
# the launchers of its kernels with a C compiler and Python's headers (the cuda target). Empty: no
# compiler in the image; everything works, slower.
ARG COMPILER="g++"
# hadolint ignore=DL3008
RUN if [ -n "$COMPILER" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends $COMPILER \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/*; \
    fi
COPY --chmod=0555 deploy/docker/healthcheck.py /opt/healthcheck.py
ENV PATH=/opt/reft/bin:/opt/app/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/app \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/reft-serve \
    REFT_HOST=0.0.0.0 \
    REFT_DATA_DIR=/var/lib/reft-serve \
    REFT_LOG_FORMAT=json
WORKDIR /var/lib/reft-serve
USER 10001:10001
VOLUME ["/var/lib/reft-serve", "/var/cache/reft-serve"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# A first start may fetch the model and compile; until the model is loaded nobody answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "/opt/healthcheck.py"]
ENTRYPOINT ["tini", "--", "reft"]
CMD ["serve"]
ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="reft-serve" \
      org.opencontainers.image.description="One frozen language model, thousands of ReFT adapters, one OpenAI-compatible API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"

FROM runtime AS gpu
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
USER 10001:10001
# Read by the container runtime of NVIDIA; the CUDA libraries come with PyTorch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM gpu AS vllm
COPY --from=dependencies-vllm /opt/reft /opt/reft
COPY --from=source /opt/app /opt/app
ENV REFT_ENGINE=vllm VLLM_NO_USAGE_STATS=1

FROM gpu AS cuda
COPY --from=dependencies-cuda /opt/reft /opt/reft
COPY --from=source /opt/app /opt/app

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/reft /opt/reft
COPY --from=source /opt/app /opt/app
