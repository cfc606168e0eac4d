"""Questions with a printed answer: what a client's step costs. Nothing here is part of the app."""
