"""How twins are made, measured and described; nothing that only uses one imports from here."""
