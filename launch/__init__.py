"""Starting runs on one machine or many, installed as `megacore.launch`."""
