"""What is not known when a request arrives, guessed from what was seen before."""
