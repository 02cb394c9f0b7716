"""The paper's tables, remade from rows of a sweep, with the published figures beside ours."""
