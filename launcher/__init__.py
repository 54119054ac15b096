"""People and clusters in, training processes out: the command line and the launchers' entry point."""
