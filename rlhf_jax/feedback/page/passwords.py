"""Passwords, by argon2id, and random tokens."""

import functools
import secrets
import threading

import argon2

LEAST_CHARACTERS = 10
TOKEN_BYTES = 32  # 256 bits: guessing is hopeless, so a plain hash of a token is enough
# Each hash takes much memory. Sign-ins at the same time wait for one another.
_HASHING = threading.BoundedSemaphore(2)


def new_token():
  """Returns a random token, URL-safe text of 256 bits."""
  return secrets.token_urlsafe(TOKEN_BYTES)


@functools.cache
def hasher(passes, memory):
  """Returns the argon2id hasher.

  Args:
    passes: Passes over the memory.
    memory: Memory in KiB.
  """
  return argon2.PasswordHasher(time_cost=passes, memory_cost=memory, parallelism=1)


def hash_password(password, settings):
  """Returns the argon2id hash of a password, which holds its salt and parameters."""
  with _HASHING:
    return hasher(settings.hash_passes, settings.hash_memory).hash(password)


@functools.cache
def _of_nobody(passes, memory):
  return hasher(passes, memory).hash(new_token())


def verify(password, password_hash, settings):
  """Checks a password.

  Without a hash, as for an unknown name, it takes the same time and answers no.

  Args:
    password: What was typed.
    password_hash: Result of `hash_password`, or None.
    settings: Settings of the page.

  Returns:
    (whether it is right, a new hash if the parameters have changed since, else None).
  """
  parameters = settings.hash_passes, settings.hash_memory
  check = hasher(*parameters)
  with _HASHING:
    try:
      check.verify(password_hash or _of_nobody(*parameters), password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
      return False, None
  if password_hash is None:
    return False, None
  stale = check.check_needs_rehash(password_hash)
  return True, hash_password(password, settings) if stale else None
