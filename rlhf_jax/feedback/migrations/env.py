"""Runs the migrations on the connection that `database` gives; alembic executes this file."""

from alembic import context

from rlhf_jax.feedback import schema

context.configure(
  connection=context.config.attributes['connection'],
  target_metadata=schema.Base.metadata,
  render_as_batch=True,
)
with context.begin_transaction():
  context.run_migrations()
