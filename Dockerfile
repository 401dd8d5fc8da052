# docker build -t vlmcap .
# docker run --gpus all --shm-size=8g -v "$PWD/data:/data:ro" -v "$PWD/outputs:/work/outputs" -v vlmcap-cache:/cache \
#     vlmcap train experiment=recommended_l4 data.root=/data
#
# Data workers hand batches over in /dev/shm, of which a container has 64 MB. A batch of 8 clips of 16 frames at
# 448 x 448 pixels is 77 MB and each worker may have two ready: 1.2 GB with 8 workers. --shm-size=8g leaves room for
# larger batches, and `docker run --gpus all --shm-size=8g vlmcap doctor` says what a configuration needs.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and the headers of Python are for Triton, which compiles its launcher on first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/vlmcap \
    && useradd --create-home --uid 1001 vlmcap \
    && install --directory --mode=1777 /cache /work /work/outputs
ENV PATH=/opt/vlmcap/bin:$PATH \
    HF_HOME=/cache/huggingface \
    VLMCAP_CACHE_DIR=/cache/vlmcap \
    PYTHONUNBUFFERED=1

# The dependencies are a layer of their own, which changes of the code leave as it is.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY hydra_plugins hydra_plugins
COPY conf conf
COPY vlmcap vlmcap
RUN pip install --no-cache-dir --no-deps . && rm -rf /src

USER 1001
WORKDIR /work
ENTRYPOINT ["vlmcap"]
CMD ["--help"]
