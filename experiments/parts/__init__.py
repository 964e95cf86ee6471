"""What a run is made of, from its configuration: a file for each part."""
