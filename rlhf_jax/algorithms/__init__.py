"""One module per algorithm; build.py describes what each must define."""
