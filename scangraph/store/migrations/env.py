"""Alembic's entry. The connection comes from `scangraph.store.database.migrate`."""

from alembic import context

from scangraph.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by making it anew
    transaction_per_migration=False,
)
context.run_migrations()
