"""The built-in model `tiny` and the scripts that train and judge it."""
