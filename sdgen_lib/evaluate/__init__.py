"""What generated images are worth: CAS and table 1, synthetic sets and table 2, for every `work.Source`."""
