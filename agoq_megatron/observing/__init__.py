"""What looks at a run: gradients' errors, bytes, series, the report. Nothing here changes what is computed,
except that ``watching.py`` gives a tensor more bits where it was told to."""
