"""What belongs to one experiment in configs/: its data, and its gold score or rule."""
