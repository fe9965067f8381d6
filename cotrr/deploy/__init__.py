"""What goes back to the pipeline."""
