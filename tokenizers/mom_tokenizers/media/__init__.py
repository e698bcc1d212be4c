"""Decodes the files of pictures and recordings.

pictures    decodes pictures with Pillow, and refuses damaged ones
shapes      the grids of pictures that are not square
recordings  decodes recordings with soundfile, and mixes their channels
containers  checks that the file of a recording is whole before it is decoded
"""
