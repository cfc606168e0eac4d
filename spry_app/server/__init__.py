"""What happens on the server: the fleet, the Strategy, the record of a run. Never imports the client."""
