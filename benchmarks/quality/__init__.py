"""What training gives on real data: runs, and the page made of their results."""
