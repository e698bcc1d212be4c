"""The commands of the project. The module of each command has a function `main`; mom_tools/__main__.py lists them."""
