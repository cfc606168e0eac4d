"""What `spry run` does around Flower: processes, a private SuperLink, progress. Nothing here learns anything."""
