"""Load tests of a gateway with Locust: `python -m loadtest --help`.

`locustfile.py` and `users.py` import Locust, which patches the standard library for gevent. The
other modules do not, so that tests and `compare.py` can use them in an ordinary process.
"""
