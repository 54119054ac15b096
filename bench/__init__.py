"""What the project claims about speed, measured as ratios within one run."""
