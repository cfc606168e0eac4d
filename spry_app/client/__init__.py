"""What happens on a client: hold a model and rows, train the units it was given, score. Knows no Flower."""
