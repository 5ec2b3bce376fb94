"""A real server that is killed at random points of upload, promote and delete.

``run`` is the whole of it: clients change names over HTTP (``client``) and note what was
acknowledged (``ledger``), the process (``process``) gets ``kill -9``, what it left is looked at
and repaired, it starts again, and everything acknowledged must be there. ``backends`` says where
catalog and files are.
"""
