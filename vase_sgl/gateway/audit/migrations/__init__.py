"""Alembic migrations of the audit store; run by `vase_sgl.gateway.audit.schema`."""
