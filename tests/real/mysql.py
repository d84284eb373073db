"""A MySQL primary and two replicas by GTID, as tests/unstable-servers downloads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pinning_middleware.servers.dialects.mysql import parse_gtids

from . import mariadb
from .layouts.unstable import UNSTABLE, not_run
from .layouts.waiting import eventually

GROUP = "c0ffee00-71ca-41e1-9e33-c80aa9429562"


class Server(mariadb.Server):
    REPLICA: ClassVar[str] = "REPLICA"
    READ_ONLY: ClassVar[str] = "super_read_only"
    POSITION: ClassVar[str] = "SELECT @@GLOBAL.gtid_executed"
    WAIT: ClassVar[str] = "SELECT WAIT_FOR_EXECUTED_GTID_SET('{}', 30)"
    RESET: ClassVar[str] = "RESET BINARY LOGS AND GTIDS"

    def options(self) -> dict[str, Any]:
        return {
            "datadir": self.folder / "data",
            "basedir": UNSTABLE / "mysql" / "usr",
            "socket": self.socket,
            "port": self.port,
            "pid-file": self.folder / "pid",
            "bind-address": "127.0.0.1",
            "mysqlx": 0,
            "secure-file-priv": "NULL",
            "server-id": self.number,
            "gtid-mode": "ON",
            "enforce-gtid-consistency": "ON",
            "super-read-only": int(self.number != 1),
            "skip-name-resolve": 1,
            "innodb-buffer-pool-size": "16M",
            "innodb-redo-log-capacity": "8M",
            "innodb-flush-log-at-trx-commit": 2,
            "replica-net-timeout": 2,
            "replica-parallel-workers": 4,
        }

    def reset_log(self) -> None:
        self.execute(self.RESET)

    @property
    def uuid(self) -> str:
        return str(self.execute("SELECT @@server_uuid")[0][0])

    @property
    def written(self) -> dict[str, int]:
        return {
            log: number
            for log, number in parse_gtids(self.position).items()
            if log.partition("/")[0].partition(":")[0] == self.uuid
        }

    def follow(self, other: mariadb.Server, **options: str) -> None:
        more = "".join(f", {key} = {value}" for key, value in options.items())
        self.execute("STOP REPLICA")
        self.execute(
            f"CHANGE REPLICATION SOURCE TO SOURCE_HOST = '127.0.0.1', SOURCE_PORT = {other.port}, "
            "SOURCE_USER = 'replica', SOURCE_PASSWORD = 'replica', SOURCE_CONNECT_RETRY = 1, "
            f"GET_SOURCE_PUBLIC_KEY = 1, SOURCE_AUTO_POSITION = 1{more}"
        )
        self.execute("START REPLICA")


class Servers(mariadb.Servers):
    SERVER: ClassVar[type[mariadb.Server]] = Server
    PREFIX: ClassVar[str] = "mysql-"
    MONITOR: ClassVar[str] = "REPLICATION CLIENT"
    HAS_ROLE: ClassVar[bool] = True
    REPLAY_ADMIN: ClassVar[str] = "REPLICATION_SLAVE_ADMIN"
    STATEMENT_TIMEOUT: ClassVar[str] = "max_execution_time = 20"
    PRIVILEGES: ClassVar[str] = "REPLICATION CLIENT"

    @staticmethod
    def find_program() -> str:
        mariadb.require_driver()
        program = UNSTABLE / "mysql" / "mysqld"
        return str(program) if program.exists() else not_run("MySQL")

    def install(self) -> tuple[str, Path]:
        program = self.find_program()
        options = ("--initialize-insecure", f"--basedir={UNSTABLE / 'mysql' / 'usr'}")
        small = ("--innodb-redo-log-capacity=8M", "--secure-file-priv=NULL")
        template = self.make_data(program, *options, *small)
        # It holds the server's UUID, which is made anew for each copy.
        (template / "auto.cnf").unlink(missing_ok=True)
        return program, template


# Group Replication


class Member(Server):
    """A member of a group. It accepts writes if the group elects it."""

    def __init__(self, alias: str, folder: Path, program: str) -> None:
        super().__init__(alias, folder, program)
        self.group_port = mariadb.free_port()
        self.seeds = ""

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "super-read-only": 0,
            "plugin-load-add": "group_replication.so",
            "loose-group-replication-group-name": GROUP,
            "loose-group-replication-start-on-boot": "OFF",
            "loose-group-replication-local-address": f"127.0.0.1:{self.group_port}",
            "loose-group-replication-ip-allowlist": "127.0.0.1",
            "loose-group-replication-recovery-get-public-key": "ON",
            # So that a member that was stopped is soon replaced.
            "loose-group-replication-member-expel-timeout": 0,
        }

    def join(self, seeds: str, is_first: bool = False) -> None:
        self.execute(f"SET GLOBAL group_replication_group_seeds = '{seeds}'")
        if is_first:
            self.execute("SET GLOBAL group_replication_bootstrap_group = ON")
        self.execute("START GROUP_REPLICATION USER = 'replica', PASSWORD = 'replica'")
        if is_first:
            self.execute("SET GLOBAL group_replication_bootstrap_group = OFF")
        assert eventually(lambda: self.state == ("ONLINE", "PRIMARY" if is_first else "SECONDARY"))

    @property
    def state(self) -> tuple[str, str]:
        """State and role, as the member itself sees them."""
        members = "performance_schema.replication_group_members"
        own = f"SELECT member_state, member_role FROM {members} WHERE member_id = @@server_uuid"
        found = self.execute(own)
        return found[0] if found else ("", "")  # type: ignore[return-value]

    @property
    def written(self) -> dict[str, int]:
        return {
            log: number
            for log, number in parse_gtids(self.position).items()
            if log.partition("/")[0] == GROUP
        }


class Group(Servers):
    """Three members of a group with one primary."""

    SERVER: ClassVar[type[mariadb.Server]] = Member
    PREFIX: ClassVar[str] = "group-"

    def replicate(self) -> None:
        seeds = ",".join(f"127.0.0.1:{member.group_port}" for member in self.members)
        for member in self.members:
            for sql in (
                "CREATE USER replica IDENTIFIED BY 'replica'",
                "GRANT REPLICATION SLAVE, CONNECTION_ADMIN ON *.* TO replica",
                "GRANT BACKUP_ADMIN, GROUP_REPLICATION_STREAM ON *.* TO replica",
            ):
                member.execute(f"SET SESSION sql_log_bin = 0; {sql}")
            member.join(seeds, is_first=member is self.members[0])

    @property
    def members(self) -> list[Member]:
        return [member for member in self.nodes.values() if isinstance(member, Member)]
