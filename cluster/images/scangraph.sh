#!/bin/sh
# The command, in an image: the environment was built before the code was there, so it has none of its own.
exec /srv/scangraph/.envs/base/bin/python -m scangraph.cli "$@"
