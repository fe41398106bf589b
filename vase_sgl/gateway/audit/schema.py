"""The version of a store's tables: which one it has, and how it gets the newest."""

from __future__ import annotations

import functools
import importlib.resources
import logging

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from vase_sgl.gateway.audit.errors import AuditError

logger = logging.getLogger(__name__)
# It would announce every look at the version, and warns of DDL that here is in a transaction.
logging.getLogger("alembic").setLevel(logging.WARNING)

#: Revision that databases without Alembic's own table have.
_UNMARKED = "0001"
#: Any constant; gateways that migrate one PostgreSQL at the same time take turns.
_ADVISORY_LOCK = 0x76617365


def newest() -> str:
    """The revision this code works with."""
    head = _revisions().get_current_head()
    assert head is not None
    return head


def current(connection: Connection) -> str | None:
    """The store's revision; None if it is empty. Raises `AuditError` if it is nobody's we know."""
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        revision = MigrationContext.configure(connection).get_current_revision()
        known = [script.revision for script in _revisions().walk_revisions()]
        if revision is not None and revision not in known:
            raise AuditError(
                f"the audit store has schema revision {revision}, which this version of vase_sgl "
                f"does not know (its newest is {newest()}); run the version that made it, or a "
                "newer one"
            )
        return revision
    if "records" not in tables:
        return None
    versions = (
        list(connection.scalars(text("SELECT version FROM schema_version")))
        if "schema_version" in tables
        else []
    )
    if versions != [1]:
        raise AuditError(
            "the database has a table `records` that is not an audit store's; name another "
            "database in audit.url"
        )
    return _UNMARKED


def upgrade(connection: Connection) -> None:
    """Bring the store to the newest revision, in the connection's transaction.

    An empty database gets its tables; one made before there were migrations is taken over with
    all its records. Raises `AuditError`.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    before = current(connection)
    if before == newest():
        return
    logger.info("audit store: schema %s becomes %s", before or "none", newest())
    config = _config()
    config.attributes["connection"] = connection
    if before == _UNMARKED and "alembic_version" not in inspect(connection).get_table_names():
        command.stamp(config, _UNMARKED)
    command.upgrade(config, "head")


@functools.cache
def _revisions() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    folder = importlib.resources.files("vase_sgl.gateway.audit") / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config
