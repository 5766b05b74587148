"""Versions of the feedback store's tables, as alembic runs them."""
