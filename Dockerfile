# One image for the API and the worker; the command chooses.
#
#   docker build -t graft .
#   docker build -t graft --build-arg TORCH_INDEX=ADDRESS .    (ADDRESS of an index of CPU wheels: 2 GB smaller)
#
# Beyond loopback Graft asks for an API key, and refuses to start without one; so make one first:
#
#   docker run --rm -v graft:/data graft graft keys create --scope admin
#   docker run -p 8000:8000 -v graft:/data graft

FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/graft
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first: it is the largest part and the one that changes least, so it keeps its own layer.
RUN if [ -n "$TORCH_INDEX" ]; then \
        /opt/graft/bin/pip install -c constraints.txt --index-url "$TORCH_INDEX" torch torchvision; \
    else \
        /opt/graft/bin/pip install -c constraints.txt torch torchvision; \
    fi
COPY app app
COPY worker worker
COPY migrations migrations
RUN /opt/graft/bin/pip install -c constraints.txt '.[demo,postgres]'

FROM python:3.12-slim
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
# The start allows for importing torch on a cold disk.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["graft", "up", "--host", "0.0.0.0"]
