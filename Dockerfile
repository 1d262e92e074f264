# The service, for CPUs or for GPUs of NVIDIA:
#   docker build -t detailflow-serve .
#   docker build -t detailflow-serve --build-arg TORCH=cu128 .
#   docker run -p 8000:8000 -e DETAILFLOW_API_KEY=… detailflow-serve          # with --gpus all for CUDA
#   docker run -p 8000:8000 -e DETAILFLOW_API_KEY=… -v ./models:/models:ro detailflow-serve --model /models/own
FROM python:3.12-slim-bookworm

# PyTorch's own builds: cpu, or a CUDA version such as cu128
ARG TORCH=cpu

# The native engine for CPUs is compiled at first use
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:12.* \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir "torch>=2.9" --index-url "https://download.pytorch.org/whl/${TORCH}"

WORKDIR /opt/detailflow
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# hadolint ignore=DL3013  # it is this folder, whose pyproject.toml has the versions
RUN pip install --no-cache-dir ".[serve]" \
    && useradd --uid 1000 --create-home detailflow
USER 1000
WORKDIR /home/detailflow

EXPOSE 8000
HEALTHCHECK --start-period=60s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz')"]
# Beyond this machine the server wants a key, in DETAILFLOW_API_KEY
ENTRYPOINT ["detailflow", "serve", "--host", "0.0.0.0", "--port", "8000"]
