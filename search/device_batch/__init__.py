"""Candidates for a GPU that is elsewhere: compiled here, run there, judged here.

`flow` proposes and compiles, which needs no GPU, and takes in what came back; `runner` is the other side and
needs neither torch nor TVM nor a compiler; `files` is what goes to and fro.
"""
