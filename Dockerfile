# docker build -t alignjax .                            for CPUs
# docker build -t alignjax --build-arg EXTRAS=gpu .     for NVIDIA GPUs; EXTRAS=gpu,eval,gcs adds other extras
# docker run --rm -v "$PWD/runs:/work/runs" alignjax run --config=ppo_ptx:tiny      with --gpus all on a GPU machine
# docker run --rm alignjax --help
#
# The process is the user 1000; where that is not the owner of the folder that is mounted, give
# docker run --user "$(id -u)" --env HOME=/tmp.
FROM python:3.12.11-slim-bookworm
ARG EXTRAS=
WORKDIR /alignjax
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY alignjax alignjax
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}"
RUN useradd --uid 1000 --create-home alignjax && mkdir -p /work/runs && chown -R alignjax /work
USER alignjax
WORKDIR /work
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["alignjax"]
