"""The numerical core: directions from seeds, slopes along them, gradients. Never Flower, files or model loading."""
