"""The commands of the project. Each module has a function main; mom_tools/__main__.py lists them."""
