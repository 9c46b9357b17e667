"""Calibrated quantisation: scales and codes that are chosen with inputs the model really gets, pictures included."""
