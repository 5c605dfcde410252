"""Runs code in Jupyter kernels, for the packages of E2B's code interpreter.

A server on port 49999 keeps the kernels ("contexts"). A kernel of Python is IPython's. Those of
bash and JavaScript run a shell or Node.js as a child.
"""
