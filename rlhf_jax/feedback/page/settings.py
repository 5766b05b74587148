"""Settings of the labelling page: hosts, sessions, limits, and the cost of a password hash."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the page. The defaults are for a small team.

  Attributes:
    allowed_hosts: Names in the Host header that are answered. Others are refused, since a web page
      elsewhere can make its own name point to this machine (DNS rebinding).
    idle_seconds: A session ends when it was not used for so long.
    session_seconds: A session ends so long after the sign-in.
    name_rate: Attempts to sign in by one name, as `limits` writes rates.
    address_rate: Attempts to sign in from one address.
    post_rate: Requests of one session that change something.
    body_bytes: Maximum size of a request's body.
    body_seconds: Time in which the body must arrive.
    hash_passes: Passes of argon2id over its memory, the time_cost of argon2-cffi.
    hash_memory: Memory of argon2id in KiB.
  """

  allowed_hosts: tuple[str, ...] = ('localhost', '127.0.0.1', '[::1]')
  idle_seconds: float = 12 * 3600.0
  session_seconds: float = 7 * 24 * 3600.0
  name_rate: str = '10 per 5 minutes'
  address_rate: str = '60 per 5 minutes'
  post_rate: str = '240 per minute'
  body_bytes: int = 256 * 1024
  body_seconds: float = 20.0
  hash_passes: int = 3
  hash_memory: int = 64 * 1024
