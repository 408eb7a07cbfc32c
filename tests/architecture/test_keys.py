"""No key of a run file is ignored: each is read somewhere, or refused."""

import ast

from megacore.config.load import all_keys
from megacore.config.supported import WORKS
from tests.architecture.sources import library


def test_every_key_is_read_or_refused():
    """Read is a key whose last name is an attribute outside config/: a wide net, but it catches what was forgotten."""
    read = {
        node.attr
        for source in library()
        if source.room not in ("config", "bench", "tools")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
    }
    ignored = [key for key in all_keys() if key.rpartition(".")[2] not in read and key not in WORKS]
    assert not ignored, f"nothing reads {ignored}: use them, or put them into config/supported.py"
