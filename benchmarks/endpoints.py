"""
One alias that resolves to two replicas, one of which lags: the replay of one at a time is paused
for 0.2 to 1.5 s. By libpq's list of hosts in random order, and through HAProxy.
"""

from __future__ import annotations

import os

from django.test import override_settings

from sample_site.cluster import Cluster
from tests.real.layouts.daemons import haproxy

from .fleet import OURS, ReplayObserver, entry, lag, meanwhile, run, site

READS = int(os.environ.get("READS", "20000"))
AGES = (None, 0)


def main() -> None:
    def layouts(cluster: Cluster) -> dict[str, dict[str, object]]:
        hosts = ",".join(node.host for node in cluster.replicas)
        ports = ",".join(str(node.port) for node in cluster.replicas)
        return {
            "hosts": entry(hosts, ports, load_balance_hosts="random"),
            # Its port is known once it runs.
            "proxy": entry("127.0.0.1", 0),
        }

    with site(more=layouts) as cluster, haproxy(*cluster.replicas) as proxy:
        from django.db import connections

        entries = connections.settings
        entries["proxy"]["PORT"] = str(proxy.port)
        for alias in ("hosts", "proxy"):
            for age in AGES:
                entries["default"]["CONN_MAX_AGE"] = entries[alias]["CONN_MAX_AGE"] = age
                connections.close_all()
                with (
                    override_settings(PINNING_REPLICAS=[alias]),
                    ReplayObserver(cluster) as observer,
                    meanwhile(lag(cluster)),
                ):
                    tally = run(OURS, READS // 4, cluster, observer)
                name = {"hosts": "libpq's hosts", "proxy": "HAProxy"}[alias]
                print(f"{name:14} CONN_MAX_AGE = {age!s:5}", tally.line(cluster), flush=True)
                cluster.wait_caught_up()


if __name__ == "__main__":
    main()
