"""A typed client of a scangraph server. Needs neither Ray nor any of the server's packages.

>>> from scangraph import Client
>>> with Client("http://127.0.0.1:8000") as client:                               # doctest: +SKIP
...     client.login("ann", "…")
...     done = client.run("organs", {"image": "ct.nii.gz"}, "results")

`AsyncClient` has the same methods as coroutines. Both speak in the models of `scangraph.contracts.api`, and raise the classes
of `scangraph.contracts.errors`.
"""

from scangraph.client.access import Login
from scangraph.client.blocking import Client
from scangraph.client.calls import AsyncClient, Finished, Pipeline
from scangraph.client.failures import ServerError, ServerUnreachable
from scangraph.client.live import StepUpdate, Update

__all__ = [
    "AsyncClient",
    "Client",
    "Finished",
    "Login",
    "Pipeline",
    "ServerError",
    "ServerUnreachable",
    "StepUpdate",
    "Update",
]
