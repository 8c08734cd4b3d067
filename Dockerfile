# One image for the API and the worker; the command chooses.
#
#   docker build -t graft .
#   docker build -t graft --build-arg TORCH_INDEX=ADDRESS .    (ADDRESS of an index of CPU wheels: 2 GB smaller)
#
# Beyond loopback Graft asks for an API key, and refuses to start without one; so make one first:
#
#   docker run --rm -v graft:/data graft graft keys create --scope admin
#   docker run -p 8000:8000 -v graft:/data graft

# Pin it by digest where the registry can be asked: --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.12.12-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/graft
WORKDIR /source
COPY requirements.lock ./
# Wheels for the CPU are other files than those of the lock: its versions, but not its digests, and without CUDA.
RUN if [ -n "$TORCH_INDEX" ]; then \
        sed -e ':next;/\\$/N;s/\\\n//;tnext' requirements.lock > joined.lock \
        && grep -oE '^(torch|torchvision)==[^ ]+' joined.lock > torch.txt \
        && /opt/graft/bin/pip install --index-url "$TORCH_INDEX" -r torch.txt \
        && grep -vE '^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' joined.lock > requirements.lock; \
    fi \
    && /opt/graft/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY graft_client graft_client
COPY worker worker
COPY migrations migrations
RUN /opt/graft/bin/pip install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 10001 graft && install -d -o graft -g graft /data
COPY --from=build /opt/graft /opt/graft
ENV PATH=/opt/graft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRAFT_DATA_DIR=/data \
    GRAFT_LOG_FORMAT=json
USER 10001
WORKDIR /home/graft
VOLUME /data
EXPOSE 8000
# The start allows for importing torch on a cold disk. A worker listens nowhere: it is well while it lives.
# hadolint ignore=DL3025
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD grep -aqw worker /proc/1/cmdline || python -c "import http.client, os; \
server = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('GRAFT_PORT') or 8000), timeout=4); \
server.request('GET', '/healthz'); \
exit(server.getresponse().status != 200)"
STOPSIGNAL SIGTERM
CMD ["graft", "up", "--host", "0.0.0.0"]
