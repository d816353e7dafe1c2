"""What is taken out of a run: generated sets in three formats, the trained generator, and the cards beside them."""
