"""Models in Hugging Face's folders, read and written slice by slice. A family of models is one file in `families/`."""
