"""How annotations are checked under pytest: shapes by jaxtyping, everything else by beartype."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for every other type checker
