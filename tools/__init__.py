"""Commands, one file each, installed as `megacore.tools`: thin faces over the library."""
