"""The checker that tests/conftest.py puts around every function of ours."""

from beartype import BeartypeConf, beartype

# As for mypy, an int is welcome where a float is.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
