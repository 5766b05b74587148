"""One file an algorithm; see build.py for what each must have."""
