"""What programs need around a model, one idea per file; the model itself is in the files of the folder above."""
