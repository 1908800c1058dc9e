"""How good generations are: classifiers trained on real clips, distances to the training set, and a page to look at."""
