"""`spry deploy`: certificates, node keys and the list of nodes of a deployment. Trains nothing, starts no server."""
