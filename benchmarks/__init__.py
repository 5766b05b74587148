"""Speed and memory, as tables; nothing of this is installed."""
