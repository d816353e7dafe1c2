"""What lies on the disk: files that appear whole, locks between processes, the results of a run, sets of images."""
