#!/usr/bin/env bash
# pyuwsgi 2.0.30, CPython 3.11: a thread that the application starts runs between requests although `enable-threads` is not set.
# https://uwsgi-docs.readthedocs.io/en/latest/ThingsToKnow.html says "By default the Python plugin does not initialize the GIL. This
# means your app-generated threads will not run."
# Expected, by the documentation: no tick while no request runs, unless with `enable-threads`.
# Seen: 20 or a few more ticks of 0.1 s in 2 s without requests, with the option and without.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill -INT "$server" 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'pyuwsgi==2.0.30'
cat >"$folder/app.py" <<'PYTHON'
import threading
import time

ticks = []


def run():
    while True:
        ticks.append(1)
        time.sleep(0.1)


def application(environ, start_response):
    if not ticks:
        threading.Thread(target=run, daemon=True).start()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(len(ticks)).encode()]
PYTHON
count() {
    python3 -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())' "http://127.0.0.1:$port" 2>/dev/null
}
status=0
for option in "" --enable-threads; do
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    # shellcheck disable=SC2086
    (cd "$folder" && exec venv/bin/uwsgi --http-socket "127.0.0.1:$port" --wsgi-file app.py --master --processes 1 $option \
        --disable-logging >log 2>&1) &
    server=$!
    for _ in {1..100}; do first=$(count) && break || sleep 0.1; done
    sleep 2
    last=$(count)
    echo "options '$option': ticks in 2 s without requests: $((last - first))"
    ((last - first >= 10)) || status=1
    kill -INT "$server"
    wait "$server" || true
    server=
done
exit $status
